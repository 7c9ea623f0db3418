"""Half precision: governance reads true gradients, survives the steps that a GradScaler throws away, and moves no bit.

Everything runs on the CPU: torch's float16 autocast, `GradScaler("cpu")` and the fused AdamW all exist there. A fused
optimizer gets gradients that are still scaled, with `grad_scale` and `found_inf` as its attributes, and runs its step
hooks even for a step that comes to nothing; any other optimizer gets unscaled gradients, or no step at all.
"""

import copy
import math

import pytest
import torch

from lbw_rl import Action, Authority, Controller, Directive, Governor
from lbw_rl.entropy import ESTIMATORS

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0), slew_up=1e6)
RATE = 0.01
STEPS = 12
OVERFLOWS = (0, 4, 5)  # the first step, when there is no optimizer state yet, and two in a row
LOSS_SCALE = 1024.0


class Scripted(Controller):
    """Proposes the action of the step at hand, as the test says."""

    name = "scripted"

    def __init__(self, action=lambda step: Action()):
        self.action, self.seen = action, []

    def reset(self, context):
        pass

    def act(self, telemetry):
        self.seen.append(telemetry)
        return self.action(len(self.seen) - 1)


def varying(decision):
    return Action(lr_scale=2.0 ** ((5 * decision % 7 - 3) / 2), momentum_scale=1.5 if decision % 2 else 1.0)


def make_model(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(dtype)


def batch(step, dtype=torch.float32):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(dtype)


def true_norm(parameters, scale=1.0):
    """Global norm of the gradients without the loss scale, in float64."""
    return math.sqrt(sum(((p.grad.double() / scale) ** 2).sum().item() for p in parameters))


def bits(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def same_bits(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def scale_by_hand(optimizer, action):
    """Writes the action's rates into the parameter groups; returns what was there."""
    before = [{"lr": g["lr"], "betas": g["betas"]} for g in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * action.lr_scale
        if action.momentum_scale != 1.0:
            first, second = group["betas"]
            group["betas"] = (1.0 - (1.0 - first) / action.momentum_scale, second)
    return before


# ---- bfloat16


def bfloat16_run(kind, fused, controller=None, by_hand=None):
    """Trains under bf16 autocast, or with bf16 weights. Returns bits, governor, the true norms and losses."""
    dtype = torch.bfloat16 if kind == "weights" else torch.float32
    model = make_model(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=fused)
    governor = Governor(optimizer, controller, authority=WIDE) if controller is not None else None
    norms, losses = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
            out = model(batch(step, dtype))
            loss = out.float().square().mean()
        assert out.dtype == torch.bfloat16
        loss.backward()
        norms.append(true_norm(model.parameters()))
        losses.append(loss.item())
        if governor is not None:
            governor.observe(loss)
        before = scale_by_hand(optimizer, by_hand(step)) if by_hand else []
        optimizer.step()
        for group, saved in zip(optimizer.param_groups, before):
            group.update(saved)
        assert optimizer.param_groups[0]["lr"] == RATE
    return bits(model, optimizer), governor, norms, losses


@pytest.mark.parametrize("kind", ["autocast", "weights"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_in_bfloat16_an_idle_governor_moves_no_bit_and_reads_true_gradients(kind, fused):
    plain, _, norms, losses = bfloat16_run(kind, fused)
    controller = Scripted()
    idle, governor, _, _ = bfloat16_run(kind, fused, controller)
    assert same_bits(idle, plain)
    # A bf16 norm kernel rounds to 8 bits.
    assert [t.grad_norm for t in controller.seen] == pytest.approx(norms, rel=1e-2 if kind == "weights" else 1e-5)
    assert [t.loss for t in controller.seen] == pytest.approx(losses)
    assert all(t.update_ratio > 0 and math.isfinite(t.surprise) for t in controller.seen[1:])
    assert governor.summary()["faults"] == {}


@pytest.mark.parametrize("kind", ["autocast", "weights"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_in_bfloat16_a_governed_run_equals_the_loop_that_scales_by_hand(kind, fused):
    governed, governor, _, _ = bfloat16_run(kind, fused, Scripted(varying))
    by_hand, _, _, _ = bfloat16_run(kind, fused, by_hand=varying)
    assert same_bits(governed, by_hand)
    assert governor.summary()["faults"] == {}


# ---- float16 with a GradScaler


class ScaledRun:
    """A float16 autocast loop with a GradScaler, as torch's documentation writes it.

    Args:
        fused: AdamW's fused kernel, which unscales for itself.
        clip: unscale explicitly and clip before the step, to this norm.
        by_hand: scale the rates without a governor, by the action of the n-th step that the optimizer sees.
        passes_norm: tell the governor what `clip_grad_norm_` returned.
    """

    def __init__(self, fused, controller=None, clip=None, by_hand=None, passes_norm=False, overflows=OVERFLOWS):
        self.model = make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE, growth_interval=3)
        self.fused, self.clip, self.by_hand, self.passes_norm = fused, clip, by_hand, passes_norm
        self.overflows = overflows
        self.governor = Governor(self.optimizer, controller, authority=WIDE) if controller is not None else None
        self.norms, self.seen_steps, self.scales = [], 0, []

    def advance(self, steps=range(STEPS), micro_batches=1):
        for step in steps:
            self.optimizer.zero_grad()
            for micro in range(micro_batches):
                with torch.autocast("cpu", dtype=torch.float16):
                    out = self.model(batch(100 * micro + step))
                    assert out.dtype == torch.float16
                    loss = out.float().square().mean() / micro_batches
                self.scaler.scale(loss).backward()
            overflow = step in self.overflows
            if overflow:
                self.model[0].weight.grad[0, 0] = math.inf
            loss_scale = self.scaler.get_scale()
            self.norms.append(true_norm(self.model.parameters(), loss_scale))
            if self.clip is not None:
                self.scaler.unscale_(self.optimizer)
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
                if self.governor is not None and self.passes_norm:
                    self.governor.observe(grad_norm=norm)
            before = bits(self.model, self.optimizer)
            saved = []
            if self.by_hand is not None:
                saved = scale_by_hand(self.optimizer, self.by_hand(self.seen_steps))
            self.scaler.step(self.optimizer)
            for group, was in zip(self.optimizer.param_groups, saved):
                group.update(was)
            self.scaler.update()
            if overflow:
                self.check_nothing_moved(before)
            if self.fused or not overflow:
                self.seen_steps += 1
            self.scales.append(self.scaler.get_scale())
            assert self.optimizer.param_groups[0]["lr"] == RATE
            assert self.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        return self

    def check_nothing_moved(self, before):
        model, optimizer = bits(self.model, self.optimizer)
        assert same_bits(model, before[0])
        if before[1]["state"]:
            assert same_bits(optimizer, before[1])
        for state in optimizer["state"].values():  # a fused first step makes zeroed state before it gives up
            assert before[1]["state"] or not any(t.any() for t in state.values())

    def bits(self):
        return bits(self.model, self.optimizer), self.scaler.state_dict()


FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
CLIP = pytest.mark.parametrize("clip", [None, 0.05, 1e6], ids=["no-clip", "clip", "clip-inactive"])


@FUSED
@CLIP
def test_an_idle_governor_moves_no_bit_of_a_scaled_run_nor_of_its_scaler(fused, clip):
    """Three overflows, growth of the loss scale in between, clipping or none."""
    plain = ScaledRun(fused, clip=clip).advance()
    idle = ScaledRun(fused, Scripted(), clip=clip).advance()
    assert same_bits(idle.bits(), plain.bits())
    assert idle.scales == plain.scales
    assert min(plain.scales) == LOSS_SCALE / 4  # two overflows in a row backed off
    assert plain.scales[-1] > min(plain.scales)  # and it grew again
    assert idle.governor.summary()["faults"] == {}


@FUSED
@CLIP
def test_a_governed_scaled_run_equals_the_loop_that_scales_by_hand(fused, clip):
    """An action executes in the step that it was decided for; a thrown-away step leaves no scale behind."""
    governed = ScaledRun(fused, Scripted(varying), clip=clip).advance()
    by_hand = ScaledRun(fused, by_hand=varying, clip=clip).advance()
    assert same_bits(governed.bits(), by_hand.bits())
    assert governed.governor.summary()["faults"] == {}


@FUSED
def test_telemetry_sees_unscaled_gradients(fused):
    """Differential: the norm without the loss scale, computed from the gradients themselves."""
    controller = Scripted(varying)
    run = ScaledRun(fused, controller, overflows=()).advance()
    assert [t.grad_norm for t in controller.seen] == pytest.approx(run.norms, rel=1e-5)
    assert len(set(run.scales)) > 3  # whatever the loss scale is at the moment
    assert max(run.norms) < LOSS_SCALE / 100


@FUSED
def test_telemetry_sees_unscaled_gradients_of_several_micro_batches(fused):
    controller = Scripted()
    run = ScaledRun(fused, controller, overflows=()).advance(micro_batches=3)
    assert [t.grad_norm for t in controller.seen] == pytest.approx(run.norms, rel=1e-5)


@FUSED
def test_after_an_explicit_unscale_the_gradients_are_not_unscaled_twice(fused):
    """`scaler.unscale_` comes before clipping; the fused optimizer is then told no loss scale."""
    controller = Scripted()
    run = ScaledRun(fused, controller, clip=1e6, overflows=()).advance()
    assert [t.grad_norm for t in controller.seen] == pytest.approx(run.norms, rel=1e-5)


@FUSED
def test_the_norm_that_clipping_returned_is_the_unscaled_one_before_clipping(fused):
    controller = Scripted()
    run = ScaledRun(fused, controller, clip=0.05, passes_norm=True, overflows=()).advance()
    assert [t.grad_norm for t in controller.seen] == pytest.approx(run.norms, rel=1e-5)
    assert min(run.norms) > 0.05  # it was clipped


@pytest.mark.parametrize("clip", [None, 1e6], ids=["implicit", "explicit"])
def test_a_fused_optimizer_and_a_plain_one_yield_the_same_signals(clip):
    """`surprise` compares gradients with unscaled second moments: it is wrong by the loss scale if they are scaled."""
    signals = {}
    for fused in (False, True):
        controller = Scripted()
        ScaledRun(fused, controller, clip=clip, overflows=()).advance()
        signals[fused] = [
            [
                *(t.grad_norm, t.surprise, t.update_ratio, t.grad_cosine, t.weight_rms),
                *(getattr(t, signal) for signal, _ in ESTIMATORS.values()),
            ]
            for t in controller.seen[1:]
        ]
    for plain, fused in zip(signals[False], signals[True], strict=True):
        assert fused == pytest.approx(plain, rel=2e-3)
    assert min(s[6] for s in signals[True]) > 0.999  # softmax: gradients left scaled would read as another run


@FUSED
def test_the_governor_counts_the_steps_that_the_optimizer_took(fused):
    """A plain optimizer is never asked for a step that overflowed. A fused one is, so a decision is made."""
    controller = Scripted()
    run = ScaledRun(fused, controller).advance()
    taken = STEPS - len(OVERFLOWS)
    assert len(controller.seen) == run.seen_steps == (STEPS if fused else taken)
    assert run.governor.summary()["decisions"] == run.seen_steps
    assert run.optimizer.state[run.model[0].weight]["step"] == taken
    assert run.governor.step in {taken, run.seen_steps}


def test_a_fused_step_that_overflows_is_seen_as_non_finite_and_poisons_nothing_after():
    controller = Scripted()
    run = ScaledRun(True, controller).advance()
    assert [t.nonfinite == 1.0 for t in controller.seen] == [step in OVERFLOWS for step in range(STEPS)]
    for step, telemetry in enumerate(controller.seen):
        if step not in OVERFLOWS:
            assert telemetry.grad_norm == pytest.approx(run.norms[step], rel=1e-5)
    last = controller.seen[-1]
    assert all(math.isfinite(x) for x in (last.surprise, last.grad_cosine, last.update_ratio, last.grad_entropy))


@FUSED
@pytest.mark.parametrize("name", ["lbw-guard", "pid", "entropic"])
def test_the_controllers_survive_overflows(name, fused):
    """They may skip or hold back; the scaler backs off and grows as it would, and the weights stay finite."""
    run = ScaledRun(fused, name).advance(range(30))
    plain = ScaledRun(fused).advance(range(30))
    assert run.scales == plain.scales
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert run.governor.summary()["faults"] == {}
    assert not run.governor.summary()["suspended"]


@FUSED
@pytest.mark.parametrize("clip", [None, 0.05], ids=["no-clip", "clip"])
def test_a_skip_under_a_scaler_equals_a_batch_that_never_came(fused, clip):
    """Weights and optimizer state; the scaler counts the skipped step as a good one, for its gradients were."""
    skipped = ScaledRun(
        fused,
        Scripted(lambda i: Action(directive=Directive.SKIP if i == 6 else Directive.PROCEED)),
        clip=clip,
        overflows=(),
    )
    skipped.scaler.set_growth_interval(1000)
    skipped.advance(range(10))
    without = ScaledRun(fused, clip=clip, overflows=())
    without.scaler.set_growth_interval(1000)
    without.advance([step for step in range(10) if step != 6])
    assert same_bits(bits(skipped.model, skipped.optimizer), bits(without.model, without.optimizer))
    assert skipped.governor.summary()["skips"] == 1
    assert skipped.governor.summary()["faults"] == {}
