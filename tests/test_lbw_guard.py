"""LBW-Guard's rules, each on the telemetry that it is for."""

import math

import pytest
from ratio_plant import RatioPlant

from lbw_rl import Authority, Directive
from lbw_rl.controllers.lbw_guard import LBWGuard

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0), slew_up=1e6, max_rollbacks=5, rollback_cooldown=0)


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-3, 1e-1])
def test_guard_makes_the_base_rate_cancel_out(learning_rate):
    authority = Authority(lr_scale=(1e-6, 1e6), slew_up=1e12)
    plants = [RatioPlant(LBWGuard(), authority, gain=7.0, learning_rate=lr) for lr in (learning_rate, 3e-3)]
    for step in range(40):
        one, other = (plant.decide() for plant in plants)
        if step > 2:
            assert one == pytest.approx(other)
            assert one == pytest.approx(plants[0].proposed.evidence["target"])


def test_guard_skips_a_poisoned_step_and_says_so():
    plant = RatioPlant(LBWGuard(), WIDE, gain=7.0)
    for _ in range(20):
        plant.decide()
    plant.decide(loss=math.nan, nonfinite=1.0, grad_norm=math.nan)
    assert (plant.proposed.regime, plant.proposed.directive) == ("non-finite", Directive.SKIP)


def test_guard_skips_a_gradient_burst_with_its_evidence():
    plant = RatioPlant(LBWGuard(), WIDE, gain=7.0)
    for step in range(30):
        plant.decide(grad_norm=1.0 + 0.1 * (-1) ** step)
    plant.decide(grad_norm=100.0)
    assert (plant.proposed.regime, plant.proposed.directive) == ("gradient-burst", Directive.SKIP)
    assert plant.proposed.evidence["grad_norm"] == 100.0
    plant.decide()
    assert plant.proposed.directive is Directive.PROCEED


def test_a_gradient_that_stays_large_is_not_skipped_for_ever():
    """Ten in a row at most: the weights are to blame, and they get no better while none of their updates is taken."""
    plant = RatioPlant(LBWGuard(), WIDE, gain=7.0)
    for step in range(30):
        plant.decide(grad_norm=1.0 + 0.1 * (-1) ** step)
    calm = plant.decide()
    skipped = []
    for _ in range(40):
        plant.decide(grad_norm=100.0)
        skipped.append(plant.proposed.directive is Directive.SKIP)
    assert skipped == [True] * 10 + [False] * 30
    assert plant.decide(grad_norm=100.0) < calm  # a steep place: shorter steps
    for _ in range(300):
        plant.decide()
    plant.decide(grad_norm=100.0)
    assert plant.proposed.regime == "gradient-burst"  # counted anew


def test_guard_skips_bad_batches_but_not_for_ever():
    """Ten in a row at most: if the loss stays high the weights are to blame, and the alarms take over."""
    plant = RatioPlant(LBWGuard(), WIDE, gain=7.0)
    for step in range(30):
        plant.decide(loss=5.0 + 0.05 * (-1) ** step)
    plant.decide(loss=9.0)
    assert (plant.proposed.regime, plant.proposed.directive) == ("bad-batch", Directive.SKIP)
    plant.decide(loss=5.0)
    assert plant.proposed.directive is Directive.PROCEED
    regimes = []
    for _ in range(14):
        plant.decide(loss=9.0)
        regimes.append(plant.proposed.regime)
    assert regimes[:10] == ["bad-batch"] * 10
    assert "bad-batch" not in regimes[10:]
    plant.decide(loss=5.0)
    plant.decide(loss=5.0)


def test_guard_foresees_the_first_update_of_an_overshoot_and_leaves_the_rest_to_the_inner_loop():
    """While v lags the inner loop holds the update itself: a cut at every alarm would only add to that."""
    alarmed, calm = (RatioPlant(LBWGuard(), WIDE, gain=7.0) for _ in range(2))
    for plant in (alarmed, calm):
        for _ in range(30):
            plant.decide()
    assert alarmed.decide(surprise=10.0) == pytest.approx(calm.decide() * 1.3 / 10.0)
    assert alarmed.proposed.regime == "overshoot"
    for _ in range(20):
        assert alarmed.decide(surprise=10.0) == pytest.approx(calm.decide(), rel=0.01)


def test_guard_grows_cautious_on_a_loss_spike_and_recovers():
    alarmed, calm = (RatioPlant(LBWGuard(), WIDE, gain=7.0) for _ in range(2))
    for step in range(30):
        loss = 5.0 + 0.05 * (-1) ** step
        assert alarmed.decide(loss=loss) == calm.decide(loss=loss)
    assert alarmed.decide(loss=5.8) < 0.9 * calm.decide()
    assert alarmed.proposed.regime == "loss-spike"
    for _ in range(30):
        last = alarmed.decide(), calm.decide()
    assert last[0] == pytest.approx(last[1], rel=0.05)


def test_guard_asks_to_roll_back_a_lost_run_and_is_not_stuck_there():
    plant = RatioPlant(LBWGuard(), WIDE, gain=7.0)
    for step in range(40):
        plant.decide(loss=3.0 + 0.05 * (-1) ** step)
    regimes = []
    for _ in range(20):
        plant.decide(loss=9.0)
        regimes.append(plant.proposed.directive)
    assert Directive.ROLLBACK in regimes
    for _ in range(40):
        plant.decide(loss=3.0)
    assert plant.proposed.regime in {"steady", "annealing", "holding-back", "raising"}
