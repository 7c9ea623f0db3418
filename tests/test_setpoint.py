"""The plant of the update-to-weight ratio: exact where the ratio is gain · rate, whatever the schedule does between decisions."""

import math

import pytest
import torch

from lbw_rl import Authority, Governor, Telemetry
from lbw_rl.setpoint import RatioPlant

GAIN, TARGET = 7.0, 0.02


def rates(step: int) -> float:
    """Linear warmup over 60 steps, then constant."""
    return 1e-3 * min(1.0, (step + 1) / 60)


def ratios_at_the_last_steps(every: int, *, recorded: bool = True, schedule=rates, steps: int = 120) -> list[float]:
    """The ratio that is measured before each decision, its scale held for `every` steps; from the second one on."""
    plant, scale, measured = RatioPlant(2.0), 1.0, []
    for step in range(0, steps, every):
        last = schedule(step - 1)
        if step:
            measured.append(GAIN * last * scale)
        telemetry = Telemetry(
            learning_rate=schedule(step),
            lr_scale=scale,
            update_ratio=measured[-1] if step else math.nan,
            previous_learning_rate=last if step and recorded else math.nan,
        )
        plant.observe(telemetry)
        scale = plant.scale_for(TARGET, schedule(step)) or 1.0
    return measured[1:]  # the first was at the base rate


@pytest.mark.parametrize("every", [1, 2, 10, 20])
def test_a_warmup_between_two_decisions_is_reckoned_with(every):
    at_target = ratios_at_the_last_steps(every)
    warm = [ratio for k, ratio in enumerate(at_target) if (k + 2) * every <= 60]
    assert warm == pytest.approx([TARGET] * len(warm), rel=1e-12)
    assert at_target[-1] == pytest.approx(TARGET, rel=1e-12)
    assert max(at_target) <= TARGET * (1 + 1e-12)  # nor where the warmup ends


def test_an_older_ledger_that_lacks_the_rate_is_read_as_it_was():
    assert ratios_at_the_last_steps(1, recorded=False) == pytest.approx(ratios_at_the_last_steps(1), rel=1e-12)
    assert ratios_at_the_last_steps(10, recorded=False)[0] < TARGET / 2


def test_a_falling_schedule_begins_each_decision_at_the_target():
    def falling(step: int) -> float:
        return 1e-3 * (1 - step / 200)

    measured = ratios_at_the_last_steps(10, schedule=falling)
    expected = [TARGET * falling(step - 1) / falling(step - 10) for step in range(20, 120, 10)]
    assert measured == pytest.approx(expected, rel=1e-12)


def test_a_first_group_that_waits_at_rate_zero_leaves_the_run_governed(make_mlp):
    """Gradual unfreezing: the group that trains leads, and goes on to when the other one wakes up."""
    model = make_mlp()
    first, last = model[0].parameters(), model[2].parameters()
    optimizer = torch.optim.AdamW([{"params": first, "lr": 0.0}, {"params": last, "lr": 1e-4}])
    rights = Authority(lr_scale=(1e-3, 100.0))
    told = []
    with Governor(optimizer, "lbw-guard", authority=rights, total_steps=60, measure_device=False) as governor:
        for step in range(30):
            if step == 20:
                optimizer.param_groups[0]["lr"] = 1e-6
            optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            told.append(governor.last_telemetry.learning_rate)
        state = governor.state_dict()
        assert governor.executed.lr_scale > 10  # 1e-4 is far too low for this model
    assert told == [1e-4] * 30
    with Governor(optimizer, "lbw-guard", authority=rights, total_steps=60) as resumed:
        resumed.load_state_dict(state)
        assert resumed.measure().learning_rate == 1e-4
