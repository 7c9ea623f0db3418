"""Whatever the schedule and whatever the controller: a governed rate is schedule × scale, within the authority."""

from itertools import pairwise

import pytest
import torch
from governed_runs import WIDE, Scripted, backward, bits, executed_rates, same_bits, train_mlp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbw_rl import Action, Authority, Directive, Governor, load_controller

# ---- schedules compose


def wsd(step, warmup=4, stable=12, total=20):
    return min(1.0, step / warmup) if step < stable else (total - step) / (total - stable)


SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20),
    "wsd": lambda o: torch.optim.lr_scheduler.LambdaLR(o, wsd),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.9),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=21),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5), torch.optim.lr_scheduler.ExponentialLR(o, 0.8)],
        milestones=[5],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_the_scheduled_rate_is_the_same_with_and_without_governor(schedule, tensor_lr, make_mlp):
    def scheduled(governed):
        model = make_mlp()
        groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}]
        if tensor_lr:
            groups = [{"params": model.parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.05) if tensor_lr else 0.05)
        scheduler = SCHEDULES[schedule](optimizer)
        governor = Governor(optimizer, "random", authority=WIDE, seed=5) if governed else None
        executed, rates, scales = executed_rates(optimizer), [], []
        for step in range(20):
            rates.append([float(g["lr"]) for g in optimizer.param_groups])
            backward(model, step)
            optimizer.step()
            if governor is not None:
                scales.append(governor.executed.lr_scale)
            if schedule == "plateau":
                scheduler.step(1.0)
            else:
                scheduler.step()
        return rates, executed, scales

    plain, _, _ = scheduled(governed=False)
    governed, executed, scales = scheduled(governed=True)
    assert governed == plain  # exactly, at every step, in every group
    assert executed == pytest.approx([s * lr[0] for s, lr in zip(scales, plain, strict=True)], rel=1e-6)
    assert len(set(scales)) == 20


def test_a_rate_of_exactly_zero_in_warmup_stays_zero(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for controller in ("lbw-guard", "pid", "entropic"):
        with Governor(optimizer, controller, total_steps=10) as governor:
            before = bits(model)
            train_mlp(model, optimizer, governor, steps=3)
            assert same_bits(bits(model), before)
            assert not governor.summary()["faults"]


# ---- bounded, whatever the controller does


SCALES = st.one_of(st.floats(), st.integers(-(10**320), 10**320), st.none(), st.text(max_size=2))
PROPOSALS = st.one_of(
    st.builds(Action, lr_scale=st.floats(0, 1e9), momentum_scale=st.floats(0, 1e9)),
    st.builds(
        Action,
        lr_scale=SCALES,
        momentum_scale=SCALES,
        directive=st.sampled_from([*Directive, "skip"]),
        regime=st.sampled_from(["steady", ["unhashable"], None]),
        evidence=st.sampled_from([{}, None, {"x": object()}, {("a", "b"): 1.0}]),
    ),
    st.sampled_from([None, 3.0, "faster", ValueError("on fire"), ZeroDivisionError(), RecursionError()]),
)


@given(st.lists(PROPOSALS, max_size=25), st.integers(1, 30), st.integers(1, 3))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_controller_moves_an_executed_rate_out_of_the_authority(make_mlp, proposals, suspend_after, decide_every):
    authority = Authority(
        lr_scale=(0.1, 5.0), momentum_scale=(0.5, 2.0), slew_up=1.3, suspend_after=suspend_after, max_rollbacks=1
    )
    model, base = make_mlp(), 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr=base, momentum=0.9)
    controller = Scripted(*proposals)
    governor = Governor(optimizer, controller, authority=authority, decide_every=decide_every)
    spied = []

    def spy(optimizer, *_):
        if model[0].weight.grad is not None:  # else the step is skipped: it executes no rate
            spied.append([optimizer.param_groups[0][k] for k in ("lr", "momentum")])

    optimizer.register_step_pre_hook(spy)
    train_mlp(model, optimizer, governor, steps=len(proposals) * decide_every)
    last = 1.0
    for rate, momentum in spied:
        assert 0.1 * base * (1 - 1e-12) <= rate <= 5 * base * (1 + 1e-12)
        assert rate / base <= 1.3 * last * (1 + 1e-12)
        assert 0.8 - 1e-12 <= momentum <= 0.95 + 1e-12
        last = rate / base
    faults = sum(isinstance(p, Exception) for p in proposals)
    summary = governor.summary()
    assert summary["decisions"] == len(proposals)
    assert len(spied) == len(proposals) * decide_every - summary["skips"] - summary["rollbacks"]
    assert summary["suspended"] or faults < suspend_after
    assert summary["faults"].get("controller", 0) <= suspend_after
    assert optimizer.param_groups[0]["lr"] == base


@pytest.mark.parametrize("name", ["constant", "pid", "entropic", "lbw-guard", "random", "open-loop", "ppo"])
def test_every_controller_stays_in_a_narrow_authority(name, make_mlp, policy_folder):
    authority = Authority(lr_scale=(0.9, 1.1), momentum_scale=(0.95, 1.05), slew_up=1.05)
    controller = load_controller(policy_folder if name == "ppo" else name)
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)  # a rate that makes everyone want to act
    governor = Governor(optimizer, controller, authority=authority, total_steps=60)
    rates = executed_rates(optimizer)
    train_mlp(model, optimizer, governor, steps=60)
    scales = [r / 0.3 for r in rates]
    assert all(0.9 - 1e-9 <= s <= 1.1 + 1e-9 for s in scales)
    assert all(b <= 1.05 * a + 1e-9 for a, b in pairwise(scales))
