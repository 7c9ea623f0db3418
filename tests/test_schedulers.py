"""Every learning-rate scheduler of torch and transformers reads and writes its own rate, whatever a governor executes."""

import inspect
import io
import math
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as ls

from lbw_rl import Action, Authority, Controller, Governor, load_controller
from lbw_rl.actuator import scaled_decay

try:
    import transformers
except ImportError:  # the schedulers of torch are tested all the same
    transformers = None

STEPS = 50
WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0), slew_up=1e6)

TORCH = {
    "LambdaLR": lambda o: ls.LambdaLR(o, lambda step: min(1.0, step / 5)),
    "MultiplicativeLR": lambda o: ls.MultiplicativeLR(o, lambda step: 0.9 if step % 2 else 1.05),
    "StepLR": lambda o: ls.StepLR(o, step_size=7, gamma=0.5),
    "MultiStepLR": lambda o: ls.MultiStepLR(o, milestones=[10, 11, 30], gamma=0.3),
    "ConstantLR": lambda o: ls.ConstantLR(o, factor=0.2, total_iters=10),
    "LinearLR": lambda o: ls.LinearLR(o, start_factor=1e-3, total_iters=10),
    "ExponentialLR": lambda o: ls.ExponentialLR(o, gamma=0.95),
    "SequentialLR": lambda o: ls.SequentialLR(
        o, [ls.LinearLR(o, 0.1, total_iters=10), ls.CosineAnnealingLR(o, T_max=40)], milestones=[10]
    ),
    "PolynomialLR": lambda o: ls.PolynomialLR(o, total_iters=40, power=2.0),
    "CosineAnnealingLR": lambda o: ls.CosineAnnealingLR(o, T_max=20),
    "ChainedScheduler": lambda o: ls.ChainedScheduler([ls.ConstantLR(o, 0.1, 5), ls.ExponentialLR(o, 0.95)]),
    "ReduceLROnPlateau": lambda o: ls.ReduceLROnPlateau(o, factor=0.5, patience=2),
    "CyclicLR": lambda o: ls.CyclicLR(o, base_lr=1e-3, max_lr=0.1, step_size_up=6, mode="triangular2"),
    "CosineAnnealingWarmRestarts": lambda o: ls.CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2),
    "OneCycleLR": lambda o: ls.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
}

SPECIFIC = {  # keyword arguments that a transformers scheduler cannot do without, or that make it move within the run
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.01},
    "cosine_with_restarts": {"num_cycles": 3},
    "warmup_stable_decay": {"num_decay_steps": 20},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 2},
    "greedy": {"factor": 0.8, "patience": 2, "min_lr": 1e-4},
}


def from_transformers(name):
    def make(optimizer):
        return transformers.get_scheduler(
            name,
            optimizer,
            num_warmup_steps=5,
            num_training_steps=STEPS,
            scheduler_specific_kwargs=dict(SPECIFIC.get(name, {})),
        )

    return make


HUGGING_FACE = {kind.value: from_transformers(kind.value) for kind in getattr(transformers, "SchedulerType", ())}
SCHEDULERS = {**TORCH, **HUGGING_FACE}
MOMENTUM_CYCLES = {"OneCycleLR", "CyclicLR"}

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.05),
}


def lr_scale(step):
    return 2.0 ** ((7 * step % 11 - 5) / 2)  # 0.18 … 5.7, and exactly 1 now and then


def momentum_scale(step):
    return 1.0 + (step % 5 - 2) / 5


class Varying(Controller):
    """Commands another rate and another momentum at every decision."""

    name = "varying"

    def reset(self, context):
        pass

    def act(self, telemetry):
        step = int(telemetry.step)
        return Action(lr_scale=lr_scale(step), momentum_scale=momentum_scale(step))


class Run:
    """A scheduled loop on two parameter groups that notes the rates between steps and within them."""

    def __init__(self, scheduler, controller=None, optimizer="sgd", tensor_lr=False, **options):
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
        groups = [{"params": self.model[0].parameters(), "lr": 0.02}, {"params": self.model[2].parameters()}]
        if tensor_lr:
            groups[0]["lr"], groups[1]["lr"] = torch.tensor(0.02), torch.tensor(0.05)
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.governor = None
        if controller is not None:
            options = {"authority": WIDE, "total_steps": STEPS} | options
            self.governor = Governor(self.optimizer, controller, **options)
        self.scheduled, self.executed = [], []
        self.optimizer.register_step_pre_hook(lambda *_: self.executed.append(self.rates()))  # after the governor's

    def rates(self):
        """(learning rate, momentum) of each group."""
        return [
            (float(g["lr"]), float(g["betas"][0] if "betas" in g else g["momentum"]))
            for g in self.optimizer.param_groups
        ]

    def advance(self, steps):
        for step in steps:
            self.scheduled.append(self.rates())
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            loss.backward()
            if self.governor is not None:
                self.governor.observe(loss)
            self.optimizer.step()
            if "metrics" in inspect.signature(self.scheduler.step).parameters:
                self.scheduler.step(metric(step))
            else:
                self.scheduler.step()
        return self

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def state_dict(self):
        return {k: getattr(self, k).state_dict() for k in ("model", "optimizer", "scheduler", "governor")}

    def load_state_dict(self, state):
        for k in ("model", "optimizer", "scheduler", "governor"):
            getattr(self, k).load_state_dict(state[k])


def metric(step):
    """A loss that falls, then stalls: metric-driven schedulers both raise and cut."""
    return max(0.5, 3.0 - 0.15 * step)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- nothing is left out


def test_every_scheduler_of_torch_is_here():
    classes = {
        name
        for name, cls in vars(ls).items()
        if inspect.isclass(cls) and issubclass(cls, ls.LRScheduler) and not name.startswith("_")
    }
    assert classes | set(ls.__all__) == set(TORCH) | {"LRScheduler"}  # the base class schedules nothing


def test_every_scheduler_type_of_transformers_is_here():
    pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    assert set(HUGGING_FACE) == {kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION}


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "constant"])
def test_every_scheduler_moves_the_rate_within_these_steps(name):
    """The comparisons below would prove nothing about a scheduler that stands still."""
    rates = [r[0][0] for r in Run(name).advance(range(STEPS)).scheduled]
    assert len(set(rates)) >= 2


# ---- composition


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("optimizer", "every"), [("sgd", 1), ("adamw", 3)], ids=["sgd", "adamw-held-for-3"])
def test_the_schedule_is_untouched_and_the_step_executes_scheduled_times_scale(name, optimizer, every):
    """Over 50 steps of varying scales: no rate or momentum between steps differs by one bit, nothing compounds."""
    plain = Run(name, optimizer=optimizer).advance(range(STEPS))
    governed = Run(name, Varying(), optimizer=optimizer, decide_every=every).advance(range(STEPS))
    assert governed.scheduled == plain.scheduled
    assert governed.rates() == plain.rates()
    for step, (scheduled, executed) in enumerate(zip(plain.scheduled, governed.executed, strict=True)):
        decided = step - step % every
        assert executed == [(lr * lr_scale(decided), scaled_decay(m, momentum_scale(decided))) for lr, m in scheduled]
    assert governed.governor.summary()["faults"] == {}
    assert not same(governed.weights(), plain.weights())  # the scales were at work


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_on_tensor_rates_is_untouched_too(name):
    """A scheduler fills the tensor in place (or replaces it, as GreedyLR does): the scale must not stay in either."""
    plain = Run(name, optimizer="adamw", tensor_lr=True).advance(range(STEPS))
    governed = Run(name, Varying(), optimizer="adamw", tensor_lr=True).advance(range(STEPS))
    assert governed.scheduled == plain.scheduled
    for step, (scheduled, executed) in enumerate(zip(plain.scheduled, governed.executed, strict=True)):
        for (lr, _), (rate, _) in zip(scheduled, executed, strict=True):
            assert rate == pytest.approx(lr * lr_scale(step), rel=1e-6)
    assert governed.governor.summary()["faults"] == {}


@pytest.mark.parametrize("name", sorted(MOMENTUM_CYCLES))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_scheduler_that_cycles_momentum_does_so(name, optimizer):
    """So that the momentum compared above is a moving one."""
    assert len({r[0][1] for r in Run(name, optimizer=optimizer).advance(range(STEPS)).scheduled}) > 5


@pytest.mark.parametrize("name", sorted(MOMENTUM_CYCLES))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lbw_guard_holds_its_average_of_five_steps_whatever_momentum_the_schedule_has(name, optimizer):
    """0.85 to 0.95, or 0.8 to 0.9, scheduled: averages of 5 to 20 steps. What the run began with says nothing later."""
    authority = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.1, 2.0))
    run = Run(name, "lbw-guard", optimizer=optimizer, authority=authority).advance(range(STEPS))
    scheduled = [momentum for ((_, momentum), _) in run.scheduled]
    assert max(scheduled) - min(scheduled) > 0.05
    assert [momentum for ((_, momentum), _) in run.executed] == pytest.approx([0.8] * STEPS)
    assert run.governor.last_telemetry.momentum == pytest.approx(scheduled[-1])
    assert run.governor.summary()["faults"] == {}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_idle_governor_leaves_every_bit_under_every_schedule(name):
    plain = Run(name, optimizer="adamw").advance(range(STEPS))
    idle = Run(name, "constant", optimizer="adamw").advance(range(STEPS))
    assert idle.executed == idle.scheduled == plain.scheduled
    assert same(idle.weights(), plain.weights())
    assert idle.governor.summary()["interventions"] == 0


# ---- a warmup that begins at exactly 0

FROM_ZERO = [
    "LambdaLR",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
]


@pytest.mark.parametrize(
    ("name", "controller"),
    [(name, "varying") for name in FROM_ZERO]
    + [("linear", controller) for controller in ("pid", "entropic", "lbw-guard", "random", "ppo")],
)
def test_a_warmup_from_exactly_zero_is_governed_without_nan_or_warning(name, controller, policy_folder):
    """Zero times any scale is zero: the first step moves nothing, and no controller divides by the rate."""
    if controller == "varying":
        chosen = Varying()
    else:
        chosen = load_controller(policy_folder if controller == "ppo" else controller)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(name, chosen, optimizer="adamw")
        before = run.weights()
        run.advance(range(1))
        assert [lr for lr, _ in run.scheduled[0]] == [lr for lr, _ in run.executed[0]] == [0.0, 0.0]
        assert same(run.weights(), before)
        run.advance(range(1, STEPS))
    assert run.scheduled == Run(name, optimizer="adamw").advance(range(STEPS)).scheduled
    assert all(torch.isfinite(w).all() for w in run.weights())
    assert all(math.isfinite(rate) for rates in run.executed for pair in rates for rate in pair)
    assert not same(run.weights(), before)
    assert run.governor.summary()["faults"] == {}
    assert not run.governor.summary()["suspended"]


# ---- resume


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_resumed_with_its_scheduler_equals_the_uninterrupted_one(name):
    """Closed-form schedules (LambdaLR, OneCycleLR …) and recursive ones (ExponentialLR, GreedyLR …), bit for bit."""
    every = 4
    whole = Run(name, Varying(), decide_every=every).advance(range(STEPS))
    cut = 22  # in the middle of a window
    first = Run(name, Varying(), decide_every=every).advance(range(cut))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Run(name, Varying(), decide_every=every)
    second.load_state_dict(torch.load(file, weights_only=False))
    second.advance(range(cut, STEPS))
    assert first.scheduled + second.scheduled == whole.scheduled
    assert first.executed + second.executed == whole.executed
    assert same(second.weights(), whole.weights())
