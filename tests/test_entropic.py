"""EntroPIC: each law with its analytic answer, its targets and statistics, and its three safeguards."""

import math

import pytest
import torch

from lbw_rl import Authority, Context, Directive, Governor, Telemetry
from lbw_rl.controllers.entropic import HEALTHY, EntroPIC
from lbw_rl.enforcer import Enforcer
from lbw_rl.entropy import ESTIMATORS
from lbw_rl.entropy_record import EntropyRecord
from lbw_rl.last_good import HEALTHY_REGIMES
from lbw_rl.safe_mode import SafeMode
from lbw_rl.setpoint import ratio_level


def entropies(controller, values, signal="grad_entropy_element", **signals):
    return [controller.act(Telemetry(**{signal: h}, **signals)) for h in values]


# ---- the threshold law


@pytest.mark.parametrize(
    ("ratio", "lr", "momentum"),
    [(0.5, 0.8, 1.2), (0.899, 0.8, 1.2), (0.901, 1, 1), (1.0, 1, 1), (1.099, 1, 1), (1.101, 1.2, 0.9), (1.9, 1.2, 0.9)],
)
def test_threshold_is_the_source_s_law_and_never_compounds(ratio, lr, momentum):
    controller = EntroPIC(law="threshold", target=0.5, smoothing=1)
    for action in entropies(controller, [0.5 * ratio] * 5):
        assert (action.lr_scale, action.momentum_scale) == (lr, momentum)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_estimator_names_the_signal_that_is_compared(estimator):
    controller = EntroPIC(law="threshold", estimator=estimator, target=0.5, smoothing=1)
    others = {signal: 0.5 for name, (signal, _) in ESTIMATORS.items() if name != estimator}
    (action,) = entropies(controller, [0.3], ESTIMATORS[estimator][0], **others)
    assert (action.lr_scale, action.evidence["entropy"]) == (0.8, 0.3)


def test_the_source_s_estimator_reads_high_entropy_for_ever_so_its_target_is_never_met():
    controller = EntroPIC(law="threshold", estimator="softmax", target=0.5)
    actions = entropies(controller, [1 - 1e-6, 1 - 1e-5, 1 - 1e-6], "grad_entropy_softmax")
    assert {(a.regime, a.lr_scale) for a in actions} == {("high-entropy", 1.2)}


# ---- the pi law


def test_pi_law_with_its_published_gains():
    ratio = 0.8
    actions = entropies(EntroPIC(law="pi", target=0.5, smoothing=1), [0.5 * ratio] * 3)
    error = math.log(ratio)
    expected = [math.exp(error + 0.01 * error * n) for n in (1, 2, 3)]
    assert [a.lr_scale for a in actions] == pytest.approx(expected)
    assert all(a.momentum_scale == 1 for a in actions)
    assert [a.regime for a in actions] == ["low-entropy"] * 3


def test_pi_law_does_not_wind_up():
    controller = EntroPIC(law="pi", target=0.5, smoothing=1, kp=1.0, ki=0.5)
    low = entropies(controller, [0.01] * 200)
    assert low[-1].lr_scale == pytest.approx(math.exp(-1))
    assert entropies(controller, [0.9])[0].lr_scale > math.exp(-1)
    assert max(a.lr_scale for a in entropies(controller, [0.9] * 10)) > 1.0


# ---- the set-point law, on a plant whose ratio is gain × executed rate


class Plant:
    """A run whose update-to-weight ratio is `gain` times the executed rate."""

    def __init__(self, controller, gain, learning_rate, steps=100, **authority):
        self.controller, self.gain, self.learning_rate, self.steps = controller, gain, learning_rate, steps
        self.enforcer = Enforcer(Authority(lr_scale=(1e-6, 1e6), slew_up=1e6, **authority))
        controller.reset(Context(total_steps=steps, authority=self.enforcer.authority))
        self.scale, self.ratio, self.step = 1.0, math.nan, 0

    def __call__(self, **signals):
        telemetry = Telemetry(
            progress=self.step / self.steps,
            learning_rate=self.learning_rate,
            lr_scale=self.scale,
            update_ratio=self.ratio,
            **signals,
        )
        action = self.enforcer.rule(self.controller.act(telemetry)).action
        self.scale = action.lr_scale
        self.ratio = self.gain * self.learning_rate * self.scale
        self.step += 1
        return action


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-3, 1e-1])
def test_setpoint_law_makes_the_base_rate_cancel_out(learning_rate):
    plant = Plant(EntroPIC(), gain=3.0, learning_rate=learning_rate)
    for _ in range(10):
        plant(grad_entropy_element=0.7, grad_entropy_direction=0.99)
    assert plant.ratio == pytest.approx(ratio_level(100) * math.sqrt(1 - 9 / 100))


def test_setpoint_law_cuts_while_energy_concentrates_and_comes_back_when_it_spreads_again():
    plant = Plant(EntroPIC(), gain=1.0, learning_rate=1e-2, steps=10_000)
    for _ in range(300):
        action = plant(grad_entropy_element=0.5, grad_entropy_direction=0.995)
    assert action.evidence["alpha"] == -1.0
    assert plant.ratio == pytest.approx(ratio_level(10_000) * 0.5, rel=0.05)
    for _ in range(300):
        action = plant(grad_entropy_element=0.75, grad_entropy_direction=0.995)
    assert action.evidence["alpha"] == 0.0  # and no further: a high entropy does not raise the set-point
    assert plant.ratio == pytest.approx(ratio_level(10_000), rel=0.05)


@pytest.mark.parametrize(("direction", "counts"), [(0.85, 0.0), (0.90, 0.0), (0.94, 0.5), (0.98, 1.0), (1.0, 1.0)])
def test_setpoint_law_counts_a_low_entropy_as_far_as_the_direction_is_a_coin_toss(direction, counts):
    controller = EntroPIC(smoothing=1, ki=0.0)
    (action,) = entropies(controller, [0.6], grad_entropy_direction=direction, learning_rate=1e-3)
    assert action.evidence["alpha"] == pytest.approx(max(-1.0, 4.0 * counts * math.log(0.6 / HEALTHY)))


def test_setpoint_law_needs_a_direction_before_it_cuts():
    (action,) = entropies(EntroPIC(smoothing=1), [0.3])
    assert action.evidence["alpha"] == 0.0


def test_a_gap_holds_the_last_correction():
    plant = Plant(EntroPIC(smoothing=1), gain=1.0, learning_rate=1e-2)
    for _ in range(20):
        before = plant(grad_entropy_element=0.6, grad_entropy_direction=0.99)
    after = plant()
    assert after.regime == "no-signal"
    assert after.evidence["alpha"] == before.evidence["alpha"] < 0


# ---- averages, half-life, targets


def test_it_smooths_over_three_decisions():
    actions = entropies(EntroPIC(law="pi", target=0.5), [0.2, 0.4, 0.6, 0.8])
    assert [a.evidence["entropy"] for a in actions] == pytest.approx([0.2, 0.3, 0.4, 0.6])


def test_history_halves_the_weight_of_an_entry_every_half_life():
    record = EntropyRecord("auto", smoothing=1, half_life=5, warmup=40, recalibrate=1)
    for _ in range(2000):
        record.update(0.5)
    for _ in range(5):
        record.update(0.7)
    assert record.target == pytest.approx(0.6)
    for _ in range(5):
        record.update(0.7)
    assert record.target == pytest.approx(0.65)


def test_automatic_target_is_calibrated_after_the_warmup_and_again_every_recalibration():
    controller = EntroPIC(law="threshold", target="auto", warmup=3, recalibrate=10, smoothing=1, half_life=1)
    actions = entropies(controller, [0.4, 0.6, 0.5] + [0.5] * 9 + [0.9] * 20)
    targets = [a.evidence.get("target") for a in actions]
    assert targets[:3] == [None, None, pytest.approx(0.5)]
    assert targets[3:12] == [targets[2]] * 9
    assert targets[12] == pytest.approx(0.7)  # 13 entries: the half-life of one has the newest weigh a half
    assert targets[13:22] == [targets[12]] * 9
    assert targets[22] == pytest.approx(0.9, abs=1e-3)
    assert [a.regime for a in actions[:4]] == ["calibrating", "calibrating", "steady", "steady"]
    assert actions[13].regime == "high-entropy"
    assert actions[23].regime == "steady"


def test_without_a_target_the_element_estimator_has_the_measured_one_and_the_others_find_theirs():
    assert EntroPIC().target == HEALTHY
    assert {EntroPIC(estimator=e).target for e in ESTIMATORS if e != "element"} == {"auto"}
    assert EntroPIC(estimator="histogram", target=0.4).target == 0.4


def test_without_a_signal_it_leaves_alone_and_keeps_its_record():
    controller, twin = (EntroPIC(law="pi", target=0.5) for _ in range(2))
    assert controller.act(Telemetry()).lr_scale == 1.0
    entropies(twin, [0.4])
    entropies(controller, [0.4])
    silent = controller.act(Telemetry())
    assert silent.regime == "no-signal"
    assert entropies(controller, [0.45]) == entropies(twin, [0.45])


@pytest.mark.parametrize("law", ["setpoint", "pi", "threshold"])
def test_a_gradient_that_is_not_finite_is_skipped_and_leaves_no_trace(law):
    controller, twin = EntroPIC(law=law, smoothing=2), EntroPIC(law=law, smoothing=2)
    entropies(controller, [0.6, 0.7])
    entropies(twin, [0.6, 0.7])
    action = controller.act(Telemetry(nonfinite=1.0))
    assert (action.directive, action.regime) == (Directive.SKIP, "non-finite")
    assert entropies(controller, [0.65]) == entropies(twin, [0.65])


# ---- the micro level


def test_a_group_twenty_percent_under_its_target_gets_fifteen_percent_more():
    controller = EntroPIC(micro=True, target=0.5, smoothing=1)
    controller.reset(Context(groups=("a", "b", "c", "gains")))
    assert controller.group_entropy == "element"
    action = controller.act(Telemetry(group_grad_entropy=(0.399, 0.401, 0.9, math.nan)))
    assert action.group_lr_scales == (1.15, 1.0, 1.0, 1.0)
    assert controller.act(Telemetry(group_grad_entropy=(0.5, 0.3, 0.9, math.nan))).group_lr_scales == (
        1.0,
        1.15,
        1.0,
        1.0,
    )


def test_an_automatic_target_is_each_group_s_own():
    controller = EntroPIC(micro=True, target="auto", warmup=2, smoothing=1)
    controller.reset(Context(groups=("a", "b")))
    for _ in range(2):
        controller.act(Telemetry(group_grad_entropy=(0.8, 0.2)))
    assert controller.act(Telemetry(group_grad_entropy=(0.6, 0.19))).group_lr_scales == (1.15, 1.0)


def test_a_state_that_was_saved_without_groups_leaves_them_to_start_anew():
    saved, controller = EntroPIC(target=0.5, smoothing=1), EntroPIC(micro=True, target=0.5, smoothing=1)
    entropies(saved, [0.4])
    controller.reset(Context(groups=("a", "b")))
    controller.load_state_dict(saved.state_dict())
    assert controller.act(Telemetry(group_grad_entropy=(0.3, 0.6))).group_lr_scales == (1.15, 1.0)


def test_a_controller_that_asks_for_an_unknown_estimator_is_refused_at_the_start(make_mlp):
    class Asks(EntroPIC):
        def __init__(self):
            super().__init__(micro=True)
            self.group_entropy = "renyi"

    with pytest.raises(ValueError, match=r"group_entropy: 'renyi' is unknown; accepted: histogram, .*, or None"):
        Governor(torch.optim.SGD(make_mlp().parameters(), lr=0.1), Asks())


def test_micro_level_without_measured_groups_leaves_their_proportions_alone():
    controller = EntroPIC(micro=True)
    controller.reset(Context(groups=("a", "b")))
    assert controller.act(Telemetry(grad_entropy_element=0.1)).group_lr_scales == ()
    assert EntroPIC().group_entropy is None


# ---- the macro level


def test_a_lasting_low_entropy_hands_the_run_over_to_sgd_for_good():
    controller = EntroPIC(law="threshold", target=0.5, smoothing=1, hand_over_below=0.95, patience=4)
    asked = [a.hand_over for a in entropies(controller, [0.6] * 5 + [0.4] * 3 + [0.6] + [0.4] * 4 + [0.9] * 5)]
    assert asked == [False] * 12 + [True] * 6  # three low ones in a row are a whim
    assert not any(a.hand_over for a in entropies(EntroPIC(law="threshold", target=0.5), [0.1] * 50))


def test_the_authority_has_to_permit_the_hand_over():
    controller = EntroPIC(law="threshold", target=0.5, hand_over_below=0.9, patience=1)
    (action,) = entropies(controller, [0.1])
    denied, permitted = (Enforcer(Authority(hand_over=p)).rule(action) for p in (False, True))
    assert (denied.action.hand_over, permitted.action.hand_over) == (False, True)
    assert "hand-over denied: the authority does not permit it" in denied.reasons


# ---- safe mode


OUT, IN = 0.7, 1.0


def test_safe_mode_pauses_then_goes_back_once_then_cools_down_and_is_armed_again_inside_the_band():
    safe = SafeMode((0.8, 1.2), pause=3, cooldown=5)
    skip, back, go = Directive.SKIP, Directive.ROLLBACK, Directive.PROCEED
    assert [safe(IN), safe(1.2), safe(0.8)] == [go] * 3
    assert [safe(OUT) for _ in range(4)] == [skip, skip, skip, back]
    assert [safe(OUT) for _ in range(50)] == [go] * 50  # disarmed: it never came back, and the run is not stopped
    assert [safe(IN), safe(1.3)] == [go, skip]  # armed again
    assert [safe(IN), safe(OUT)] == [go, skip]  # a pause that helped starts anew
    assert [safe(OUT) for _ in range(3)] == [skip, skip, back]
    assert [safe(IN), safe(OUT)] == [go, go]  # inside, but still cooling down


def test_safe_mode_takes_a_missing_ratio_for_nothing():
    safe = SafeMode((0.8, 1.2), pause=1, cooldown=5)
    assert [safe(math.nan), safe(OUT), safe(math.nan), safe(OUT)] == [
        Directive.PROCEED, Directive.SKIP, Directive.PROCEED, Directive.SKIP,
    ]  # fmt: skip


def test_safe_mode_of_a_run_that_never_recovers_is_bounded_by_itself_and_by_the_authority():
    authority = Authority(max_rollbacks=2, rollback_cooldown=0)
    controller, enforcer = EntroPIC(target=0.5, band=(0.8, 1.2), pause=3, cooldown=10), Enforcer(authority)
    done = [enforcer.rule(a, restorable=True).action.directive for a in entropies(controller, [0.1] * 500)]
    assert done.count(Directive.ROLLBACK) == 1
    assert done.count(Directive.SKIP) == 3
    alternating = ([0.1] * 8 + [0.5] * 12) * 40
    done = [enforcer.rule(a, restorable=True).action.directive for a in entropies(controller, alternating)]
    assert done.count(Directive.ROLLBACK) == 1  # two in all
    assert sum(d is Directive.PROCEED for d in done) > len(done) / 2


AUTO = {"law": "threshold", "target": "auto", "warmup": 4, "recalibrate": 4, "smoothing": 1, "half_life": 1.0}


def test_what_leaves_the_band_stays_out_of_an_automatic_target():
    controller = EntroPIC(**AUTO, band=(0.8, 1.2), pause=1, cooldown=1)
    targets = [a.evidence.get("target") for a in entropies(controller, [0.5] * 4 + [0.1, 0.5, 0.5, 0.9, 0.5] * 10)]
    assert targets[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("moved", [0.3, 0.8])
def test_a_run_that_has_left_the_band_for_good_gets_a_target_that_follows(moved):
    controller = EntroPIC(**AUTO, band=(0.8, 1.2), pause=2, cooldown=3)
    last = entropies(controller, [0.5] * 4 + [moved] * 40)[-1]
    assert last.evidence["target"] == pytest.approx(moved, rel=1e-3)
    assert (last.directive, last.regime, last.lr_scale) == (Directive.PROCEED, "steady", 1.0)
    assert controller.state_dict()["safe_mode"]["armed"]


def test_outside_of_the_band_while_disarmed_is_a_regime_in_which_no_state_is_kept():
    controller = EntroPIC(law="threshold", target=0.5, smoothing=1, band=(0.8, 1.2), pause=1, cooldown=50)
    regimes = [a.regime for a in entropies(controller, [0.5, 0.3, 0.3, 0.3, 0.7, 0.44])]
    assert regimes == ["steady", "safe-mode", "safe-mode", "out-of-band", "out-of-band", "low-entropy"]
    assert "out-of-band" not in HEALTHY_REGIMES
    assert "low-entropy" in HEALTHY_REGIMES  # within the band: else a rollback would lead back to long ago


@pytest.mark.parametrize("law", ["pi", "setpoint"])
def test_a_target_that_is_taken_anew_starts_the_integral_anew(law):
    controller = EntroPIC(law=law, target="auto", warmup=5, recalibrate=50, half_life=2.0, smoothing=1, ki=0.5)
    run = entropies(controller, [0.7] * 5 + [0.6] * 50, grad_entropy_direction=0.995, learning_rate=1e-3)
    assert run[40].evidence["alpha"] < -0.5
    assert run[-1].evidence["target"] == pytest.approx(0.6, rel=1e-3)
    assert run[-1].evidence["alpha"] == pytest.approx(0.0, abs=1e-2)


def test_one_old_value_is_not_judged_again_while_there_is_no_signal():
    controller = EntroPIC(law="pi", target=0.5, band=(0.8, 1.2), pause=1, hand_over_below=0.9, patience=3)
    entropies(controller, [0.45])
    silent = [controller.act(Telemetry()) for _ in range(20)]
    assert {(a.directive, a.hand_over, a.regime) for a in silent} == {(Directive.PROCEED, False, "no-signal")}


def test_where_a_skip_is_denied_the_run_goes_on_as_it_did():
    controller = EntroPIC(
        law="threshold", target=0.5, smoothing=1, micro=True, hand_over_below=0.9, patience=1, estimator="element"
    )
    controller.reset(Context(groups=("a", "b")))
    before = controller.act(Telemetry(grad_entropy_element=0.4, group_grad_entropy=(0.3, 0.6)))
    skip = controller.act(Telemetry(nonfinite=1.0))
    assert (before.group_lr_scales, before.momentum_scale, before.hand_over) == ((1.15, 1.0), 1.2, True)
    assert skip.directive is Directive.SKIP
    assert (skip.lr_scale, skip.group_lr_scales) == (before.lr_scale, before.group_lr_scales)
    assert (skip.momentum_scale, skip.hand_over) == (1.2, True)


def test_a_loaded_state_leaves_a_fixed_target_and_the_law_s_own_bounds():
    controller = EntroPIC(target=0.6)
    controller.load_state_dict(EntroPIC(target="auto", warmup=50).state_dict())
    assert entropies(controller, [0.6])[0].evidence["target"] == 0.6
    raising = EntroPIC(law="pi", target=0.1, ki=1.0)
    entropies(raising, [0.9] * 5)
    controller.load_state_dict(raising.state_dict())
    assert controller.act(Telemetry()).evidence["alpha"] == 0.0


def test_after_a_rollback_it_compares_only_what_comes_now():
    controller = EntroPIC(law="threshold", target=0.5, band=(0.8, 1.2), pause=1, cooldown=3)
    entropies(controller, [0.5, 0.5, 0.5])
    state = controller.state_dict()
    assert [a.directive for a in entropies(controller, [0.1, 0.1])] == [Directive.SKIP, Directive.ROLLBACK]
    controller.load_state_dict(state)  # as the governor's rollback does
    controller.rolled_back()
    (action,) = entropies(controller, [0.3])
    assert (action.directive, action.evidence["entropy"]) == (Directive.PROCEED, 0.3)
