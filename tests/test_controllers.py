"""One contract for every controller, and what the smallest of them do."""

import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbw_rl import CONTROLLERS, FEATURES, SIGNALS, Action, Authority, Context, Controller, Telemetry
from lbw_rl.controllers.constant import Constant
from lbw_rl.controllers.entropic import EntroPIC
from lbw_rl.controllers.lbw_guard import LBWGuard
from lbw_rl.controllers.open_loop import OpenLoop
from lbw_rl.controllers.pid import PID
from lbw_rl.controllers.ppo import FrozenPolicy
from lbw_rl.controllers.random import RandomActions
from lbw_rl.enforcer import Enforcer
from lbw_rl.policy import save_policy
from lbw_rl.registry import load_controller

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0), slew_up=1e6, max_rollbacks=5, rollback_cooldown=0)
CONTEXT = Context(total_steps=200, authority=WIDE, seed=3, groups=("first", "second"))
CASES = {
    "constant": Constant,
    "constant-scaled": lambda: Constant(lr_scale=0.3, momentum_scale=1.5),
    "pid": PID,
    "pid-full": lambda: PID(signal="grad_norm", setpoint=1.0, kp=0.5, ki=0.2, kd=0.1, deadband=0.05),
    "entropic": EntroPIC,
    "entropic-pi": lambda: EntroPIC(law="pi", estimator="histogram"),
    "entropic-threshold": lambda: EntroPIC(law="threshold", estimator="softmax", target=0.5),
    "entropic-all": lambda: EntroPIC(
        target="auto", band=(0.8, 1.2), pause=2, cooldown=4, micro=True, smoothing=1, hand_over_below=0.95, patience=2
    ),
    "lbw-guard": LBWGuard,
    "random": RandomActions,
    "open-loop": OpenLoop,
    "open-loop-path": lambda: OpenLoop(scales=[0.5, 3.0, 1.0, 0.1]),
    "open-loop-constant": lambda: OpenLoop(scales=[0.5, 3.0], constant=True),
}


@pytest.fixture(params=[*CASES, "ppo"])
def make(request, policy_folder):
    """Every controller in turn, as a function that makes one."""
    return CASES.get(request.param, lambda: FrozenPolicy(policy_folder))


def started(make) -> Controller:
    controller = make()
    controller.reset(CONTEXT)
    return controller


def a_run(seed: int, length: int = 60) -> list[Telemetry]:
    """The telemetry of a run with drifts, spikes, gaps and a poisoned step."""
    rng = np.random.default_rng(seed)
    run = []
    for step in range(length):
        drift = math.exp(0.3 * math.sin(step / 7))
        signals = {
            "step": float(step),
            "progress": step / 200,
            "learning_rate": 1e-3 * min(1.0, step / 5),
            "lr_scale": drift,
            "momentum_scale": 1.0,
            "loss": 5 - step / 30 + 0.1 * rng.normal() + (4.0 if rng.random() < 0.05 else 0.0),
            "nonfinite": 0.0,
            "grad_norm": math.exp(0.2 * rng.normal()) * (50.0 if rng.random() < 0.05 else 1.0),
            "grad_entropy": float(np.clip(0.5 + 0.1 * rng.normal(), 0, 1)),
            "grad_entropy_element": float(np.clip(0.65 + 0.1 * rng.normal(), 0, 1)),
            "grad_entropy_softmax": 1 - 1e-5 * rng.random(),
            "grad_entropy_direction": float(np.clip(0.95 + 0.05 * rng.normal(), 0, 1)),
            "grad_cosine": rng.uniform(-1, 1),
            "update_ratio": 0.02 * drift * math.exp(0.2 * rng.normal()),
            "surprise": math.exp(0.4 * rng.normal()),
            "weight_rms": 0.05,
            "step_seconds": 0.02,
            "tokens_per_second": 3e4,
            "cpu_utilization": 0.5,
        }
        gaps = [name for name in signals if rng.random() < 0.04]
        signals.update(dict.fromkeys(gaps, math.nan))
        if rng.random() < 0.03:
            signals.update(loss=math.nan, grad_norm=math.nan, nonfinite=1.0)
        groups = tuple(float(x) for x in np.clip(0.6 + 0.2 * rng.normal(size=2), 0, 1))
        run.append(Telemetry(**signals, group_grad_entropy=groups))
    return run


def decisions(controller: Controller, run: list[Telemetry]) -> list[Action]:
    return [controller.act(t) for t in run]


def plausible(name: str) -> st.SearchStrategy[float]:
    """Whatever a healthy source may report: within the table's range, as a float32, or not measured."""
    if name in ("lr_scale", "momentum_scale"):
        return st.floats(1e-3, 1e3)
    signal = SIGNALS[name]
    low, high = max(signal.low, -(2.0**100)), min(signal.high, 2.0**100)
    return st.one_of(st.just(math.nan), st.just(float(max(low, 0))), st.floats(low, high, width=32))


RUNS = st.lists(st.builds(Telemetry, **{name: plausible(name) for name in SIGNALS}), max_size=8)
NONSENSE = st.lists(st.builds(Telemetry, **dict.fromkeys(SIGNALS, st.floats())), max_size=4)
EVERY_CONTROLLER = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---- the contract


def test_a_fresh_controller_needs_no_reset(make):
    assert isinstance(make().act(Telemetry()), Action)
    assert make().name in CONTROLLERS


@given(run=RUNS)
@EVERY_CONTROLLER
def test_whatever_a_healthy_run_shows_the_proposal_is_well_formed(make, run):
    controller, enforcer = started(make), Enforcer(WIDE)
    for telemetry in run:
        action = controller.act(telemetry)
        enforcer.rule(action)
        assert enforcer.faults == 0, action
        assert action.regime
        json.dumps(dict(action.evidence))
        assert all(isinstance(v, float) for v in action.evidence.values())


@given(run=NONSENSE)
@EVERY_CONTROLLER
def test_whatever_telemetry_comes_the_executed_scales_stay_in_the_authority(make, run):
    authority = Authority(lr_scale=(0.5, 2.0), momentum_scale=(0.9, 1.1), slew_up=1.2, suspend_after=1000)
    controller, enforcer = started(make), Enforcer(authority)
    last = 1.0
    for telemetry in run:
        try:
            ruling = enforcer.rule(controller.act(telemetry))
        except (ArithmeticError, ValueError) as e:
            ruling = enforcer.rule(None, repr(e))
        assert 0.5 <= ruling.action.lr_scale <= min(2.0, last * 1.2)
        assert 0.9 <= ruling.action.momentum_scale <= 1.1
        last = ruling.action.lr_scale


def test_the_same_telemetry_gives_the_same_decisions(make):
    run = a_run(0)
    assert decisions(started(make), run) == decisions(started(make), run)


def test_reset_forgets_everything(make):
    controller = started(make)
    decisions(controller, a_run(1))
    controller.reset(CONTEXT)
    assert decisions(controller, a_run(2)) == decisions(started(make), a_run(2))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cut", [0, 1, 7, 40])
def test_state_round_trip_decides_alike_from_there_on(make, seed, cut):
    run = a_run(seed)
    original = started(make)
    decisions(original, run[:cut])
    text = json.dumps(original.state_dict(), allow_nan=False)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    expected = decisions(original, run[cut:])
    for state in (json.loads(text), torch.load(file, weights_only=True)):
        restored = started(make)
        decisions(restored, a_run(99, length=5))  # what it did before does not matter
        restored.load_state_dict(state)
        assert decisions(restored, run[cut:]) == expected
        assert restored.summary() == original.summary()


def test_one_gap_in_all_signals_does_not_derail_a_controller(make):
    run = a_run(5)
    controller = started(make)
    decisions(controller, run[:30])
    controller.act(Telemetry())
    for action in decisions(controller, run[30:]):
        assert math.isfinite(action.lr_scale)
        assert action.lr_scale > 0


# ---- by name


@pytest.mark.parametrize("name", [n for n in CONTROLLERS if n != "ppo"])
def test_every_name_loads_its_controller(name):
    assert load_controller(name).name == name


def test_a_folder_loads_its_policy_and_an_object_is_taken_as_it_is(policy_folder):
    assert isinstance(load_controller(policy_folder), FrozenPolicy)
    assert load_controller("ppo", folder=policy_folder).decide_every == 1
    pid = PID()
    assert load_controller(pid) is pid


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown name 'lqr'; accepted: constant, pid, entropic, lbw-guard, ppo"):
        load_controller("lqr")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("pid", {"gain": 1}, "controller.options.gain: pid has no such option; accepted: signal, setpoint, kp"),
        ("pid", {"kp": -1}, "pid.kp"),
        ("pid", {"ki": math.inf}, "pid.ki"),
        ("pid", {"ki": "fast"}, "controller.options"),
        ("pid", {"signal": "loss"}, "pid.signal: 'loss' is unknown; accepted: update_ratio"),
        ("pid", {"signal": "grad_norm"}, "pid.setpoint: 'auto' is known for update_ratio only"),
        ("pid", {"setpoint": 0}, "pid.setpoint"),
        ("pid", {"setpoint": math.inf}, "pid.setpoint"),
        ("entropic", {"law": "pd"}, "entropic.law: 'pd' is unknown; accepted: setpoint, pi, threshold"),
        (
            "entropic",
            {"estimator": "renyi"},
            "entropic.estimator: 'renyi' is unknown; accepted: histogram, softmax, elem",
        ),
        ("entropic", {"target": 0}, r"entropic.target: 0 must be in \(0, 1\] or 'auto'"),
        ("entropic", {"target": "high"}, "entropic.target: 'high'"),
        ("entropic", {"target": math.nan}, "entropic.target: nan"),
        ("entropic", {"target": True}, "entropic.target: True"),
        (
            "entropic",
            {"band": [1.1, 1.2]},
            r"entropic.band: \[1.1, 1.2\] must be \(low, high\) with 0 <= low < 1 < high",
        ),
        ("entropic", {"band": [0.8]}, "entropic.band"),
        ("entropic", {"band": 0.8}, "entropic.band"),
        ("entropic", {"band": [0.8, "high"]}, "entropic.band"),
        ("entropic", {"micro": True, "estimator": "tensor"}, "entropic.micro: estimator 'tensor' compares tensors"),
        ("entropic", {"hand_over_below": 1.0}, "entropic.hand_over_below"),
        ("entropic", {"half_life": 0}, "entropic.half_life"),
        ("entropic", {"cooldown": 2.5}, "entropic.cooldown"),
        ("entropic", {"target": 1.5}, "entropic.target"),
        ("entropic", {"warmup": 0}, "entropic.warmup"),
        ("entropic", {"gain": 1e4}, "entropic.gain"),
        ("constant", {"lr_scale": math.nan}, "constant.lr_scale"),
        ("constant", {"momentum_scale": 0}, "constant.momentum_scale"),
        ("lbw-guard", {"displacement": 0}, "lbw-guard.displacement"),
        ("open-loop", {"scales": [1.0, 0.0]}, r"open-loop.scales: \[1.0, 0.0\] must be a list of finite numbers > 0"),
        ("open-loop", {"scales": [math.nan]}, "open-loop.scales"),
        ("open-loop", {"scales": "1,2"}, "open-loop.scales"),
        (
            "open-loop",
            {"ledgers": ["/nowhere/l.jsonl"]},
            "open-loop.ledgers: /nowhere/l.jsonl is not a file; accepted:",
        ),
        ("open-loop", {"ledgers": ["a"], "scales": [1.0]}, "open-loop.scales: given beside ledgers"),
    ],
)
def test_a_bad_option_is_refused_by_name(name, options, reason):
    with pytest.raises(ValueError, match=reason):
        load_controller(name, **options)


# ---- constant, random


def test_constant_leaves_alone_by_default():
    assert Constant().act(Telemetry()) == Action()


def test_random_draws_are_log_uniform_within_the_authority_and_belong_to_the_seed():
    controller = RandomActions()
    draws = {}
    for seed in (0, 1):
        controller.reset(Context(authority=WIDE, seed=seed))
        draws[seed] = [controller.act(Telemetry()) for _ in range(400)]
    assert draws[0] != draws[1]
    logs = [math.log(a.lr_scale) for a in draws[0]]
    low, high = (math.log(b) for b in WIDE.lr_scale)
    assert low <= min(logs) <= max(logs) <= high
    assert np.mean(logs) == pytest.approx((low + high) / 2, abs=4 * (high - low) / math.sqrt(12 * 400))


# ---- the frozen policy


def frozen(folder, weight=0.0, bias=(0.0, 0.0), authority=WIDE):
    return save_policy(
        folder,
        [(np.broadcast_to(np.float32(weight), (2, len(FEATURES))).copy(), np.array(bias, np.float32))],
        mean=np.zeros(len(FEATURES)),
        std=np.ones(len(FEATURES)),
        authority=authority,
        decide_every=3,
        provenance={},
        card="",
    )


def test_a_policy_can_be_blind_to_what_it_was_taught_to_see(tmp_path):
    """Features that it is blind to read as not measured, others as ever; a name that is none is refused."""
    index = list(FEATURES).index("grad_cosine")
    weights = np.zeros((2, len(FEATURES)), np.float32)
    weights[0, index] = 1.0
    folder = frozen(tmp_path / "p", weight=weights)
    seen = Telemetry(grad_cosine=0.3, progress=0.9)
    assert FrozenPolicy(folder).act(seen).evidence["action_lr"] == pytest.approx(0.6)
    assert FrozenPolicy(folder, blind_to=["progress"]).act(seen).evidence["action_lr"] == pytest.approx(0.6)
    assert load_controller("ppo", folder=folder, blind_to=["grad_cosine"]).act(seen).evidence["action_lr"] == 0.0
    with pytest.raises(ValueError, match=r"^ppo.blind_to: 'loss' is no feature; accepted: progress, "):
        FrozenPolicy(folder, blind_to=["loss"])


@pytest.mark.parametrize(
    ("unit", "lr", "momentum"), [(-1.0, 1e-3, 0.5), (0.0, math.sqrt(0.1), 1.0), (1.0, 100.0, 2.0), (9.0, 100.0, 2.0)]
)
def test_a_policy_s_outputs_map_log_linearly_onto_its_authority(tmp_path, unit, lr, momentum):
    policy = FrozenPolicy(frozen(tmp_path / "p", bias=(unit, unit)))
    action = policy.act(Telemetry())
    assert (action.lr_scale, action.momentum_scale) == (pytest.approx(lr), pytest.approx(momentum))
    assert action.regime == "learned"
    assert policy.decide_every == 3


def test_a_policy_that_overflows_is_a_fault_and_not_an_extreme_action(tmp_path):
    weight = np.zeros((2, len(FEATURES)), np.float32)
    weight[:, list(FEATURES).index("progress")] = np.finfo(np.float32).max
    weight[:, list(FEATURES).index("gpu_utilization")] = np.finfo(np.float32).min
    folder = save_policy(
        tmp_path / "p",
        [(weight, np.zeros(2, np.float32))],
        mean=np.zeros(len(FEATURES)),
        std=np.full(len(FEATURES), 1e-3),
        authority=WIDE,
        decide_every=1,
        provenance={},
        card="",
    )
    policy, enforcer = FrozenPolicy(folder), Enforcer(WIDE)
    with np.errstate(all="ignore"):
        action = policy.act(Telemetry(progress=1.0, gpu_utilization=1.0))  # inf − inf
    assert math.isnan(action.lr_scale)
    enforcer.rule(action)
    assert enforcer.faults == 1


def test_unfamiliar_telemetry_is_counted_and_hands_over_to_the_rule(tmp_path):
    folder = frozen(tmp_path / "p", bias=(0.5, 0.0))
    header = json.loads((folder / "policy.json").read_text())
    header["fallback"] = {"controller": "constant", "feature_z": 2.0, "rate": 0.5, "window": 10}
    (folder / "policy.json").write_text(json.dumps(header))
    policy = FrozenPolicy(folder)
    familiar, strange = Telemetry(progress=0.5), Telemetry(progress=0.5, surprise=1e9)
    assert [policy.act(strange).regime for _ in range(5)] == ["learned-unfamiliar"] * 5
    assert [policy.act(familiar).regime for _ in range(5)] == ["learned"] * 5  # 5 of 10: not past the rate
    assert policy.summary() == {"unfamiliar_decisions": 5, "fallback_active": False}
    state = json.loads(json.dumps(policy.state_dict(), allow_nan=False))
    policy = FrozenPolicy(folder)
    policy.load_state_dict(state)  # a resumed run does not start to count anew
    for _ in range(6):
        policy.act(strange)
    assert policy.summary() == {"unfamiliar_decisions": 11, "fallback_active": True}
    assert policy.act(familiar) == Action()  # the rule, from here on
    policy.reset(Context())
    assert policy.act(familiar).regime == "learned"
