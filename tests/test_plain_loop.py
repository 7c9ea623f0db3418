"""Plain PyTorch loops as users write them: what a governor learns of them, and what it does to them."""

import copy
import io
import math
from typing import Any

import pytest
import torch

from lbw_rl import Action, Authority, Controller, Directive, Governor, clip_tap
from lbw_rl.action import NEUTRAL

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0))
STEPS, MICRO_BATCHES, CLIP, LR = 12, 3, 0.05, 0.05


class Scripted(Controller):
    """Proposes what the test says, by step, else nothing; keeps what it saw."""

    name = "scripted"

    def __init__(self, script: dict[int, Action] | None = None):
        self.script, self.seen = script or {}, []

    def reset(self, context: Any) -> None:
        self.context = context

    def act(self, telemetry: Any) -> Action:
        self.seen.append(telemetry)
        return self.script.get(int(telemetry.step), NEUTRAL)


class Run:
    """A loop with accumulation, clipping and a schedule. It tells the governor nothing but its losses."""

    def __init__(self, network: torch.nn.Module, lr: float = LR, fused: bool = False):
        self.network = network
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, fused=fused)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=2 * STEPS)
        self.governor: Governor | None = None
        self.losses: list[list[float]] = []
        self.norms: list[float] = []
        self.history: list[Any] = []

    def govern(self, controller: Any, **options: Any) -> "Run":
        stateful = {"scheduler": self.scheduler}
        settings = {"authority": WIDE, "total_steps": STEPS, "stateful": stateful, "measure_device": False}
        self.governor = Governor(self.optimizer, controller, **(settings | options))
        return self

    def step(self, number: int) -> None:
        self.history.append(self.bits())
        self.losses.append([])
        for micro in range(MICRO_BATCHES):
            loss = self.loss(MICRO_BATCHES * number + micro)
            (loss / MICRO_BATCHES).backward()
            self.losses[-1].append(loss.item())
            if self.governor is not None:
                self.governor.observe(loss)
        self.norms.append(torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP).item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def train(self, *numbers: int) -> "Run":
        for number in numbers or range(STEPS):
            self.step(number)
        return self

    def loss(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(4, 8, generator=generator), torch.randn(4, 3, generator=generator)
        return torch.nn.functional.mse_loss(self.network(x), y)

    def bits(self) -> Any:
        state = [list(self.optimizer.state.get(p, {}).values()) for p in self.network.parameters()]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return copy.deepcopy(([p.detach() for p in self.network.parameters()], state, rates))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ---- the whole loop


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_an_idle_governor_moves_no_bit_of_an_accumulating_clipping_scheduled_loop(fused, make_mlp):
    alone = Run(make_mlp(), fused=fused).train()
    for controller, mode in (("constant", "govern"), ("random", "shadow"), ("random", "off")):
        governed = Run(make_mlp(), fused=fused).govern(controller, mode=mode).train()
        governed.governor.close()
        assert same(governed.history, alone.history)
        assert same(governed.bits(), alone.bits())
        assert (governed.losses, governed.norms) == (alone.losses, alone.norms)


def test_accumulation_decides_once_a_step_from_the_mean_loss_and_the_whole_gradient(make_mlp):
    controller = Scripted()
    run = Run(make_mlp()).govern(controller).train()
    run.governor.close()
    assert [t.step for t in controller.seen] == list(range(STEPS))
    means = [sum(losses) / MICRO_BATCHES for losses in run.losses]
    assert [t.loss for t in controller.seen] == pytest.approx(means, rel=1e-6)
    assert [t.grad_norm for t in controller.seen] == pytest.approx(run.norms, rel=1e-6)


def test_a_batch_that_the_loop_itself_drops_does_not_cost_the_next_one(make_mlp):
    controller = Scripted()
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    governor = Governor(optimizer, controller, measure_device=False)
    for step in range(6):
        loss = model(torch.full((4, 8), math.nan if step == 3 else 1.0)).square().mean()
        governor.observe(loss)
        if torch.isfinite(loss):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    governor.close()
    assert [t.nonfinite for t in controller.seen] == [0.0] * 5
    assert all(math.isfinite(t.loss) for t in controller.seen)


def test_a_batch_of_several_that_did_reach_the_gradient_still_counts(make_mlp):
    controller = Scripted()
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Governor(optimizer, controller, measure_device=False) as governor:
        for value in (1.0, math.nan, 1.0):
            loss = model(torch.full((4, 8), value)).square().mean()
            governor.observe(loss)
            loss.backward()
        optimizer.step()
    assert [t.nonfinite for t in controller.seen] == [1.0]


def test_a_loss_that_is_divided_in_place_is_heard_as_it_was(make_lm, tokens):
    controller = Scripted()
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Governor(optimizer, controller, model=model, measure_device=False):
        loss = model(input_ids=tokens(0), labels=tokens(0)).loss
        heard = loss.item()
        loss /= 8
        loss.backward()
        optimizer.step()
    assert controller.seen[0].loss == heard


def test_a_skipped_step_equals_one_whose_batches_never_came(make_mlp):
    skipping = Run(make_mlp()).govern(Scripted({5: Action(directive=Directive.SKIP)})).train()
    assert skipping.governor.summary()["skips"] == 1
    skipping.governor.close()
    without = Run(make_mlp()).train(*range(5))
    without.scheduler.step()  # the loop's schedule goes on at a skipped step
    without.train(*range(6, STEPS))
    assert same(skipping.bits(), without.bits())


def test_after_a_rollback_the_run_is_the_one_that_never_saw_the_batches_between(make_mlp):
    authority = Authority(max_rollbacks=1, snapshot_every=4)
    rolled = Run(make_mlp()).govern(Scripted({7: Action(directive=Directive.ROLLBACK)}), authority=authority).train()
    assert rolled.governor.summary()["rollbacks"] == 1
    assert not rolled.governor.summary()["faults"]
    rolled.governor.close()
    without = Run(make_mlp()).train(*range(4))  # up to the last good state
    without.scheduler.step()  # of the step that rolled back: the loop went on after it
    without.train(*range(8, STEPS))
    assert same(rolled.bits(), without.bits())


@pytest.mark.parametrize("controller", ["lbw-guard", "pid", "entropic", "random"])
@pytest.mark.parametrize("every", [1, 4], ids=["each-step", "in-mid-window"])
def test_a_resumed_loop_equals_the_uninterrupted_one_bit_for_bit(controller, every, make_mlp, tmp_path):
    def start(ledger: str) -> Run:
        authority = Authority(lr_scale=(1e-3, 100.0), max_rollbacks=2, snapshot_every=2)
        options = {"decide_every": every, "authority": authority, "ledger": tmp_path / ledger}
        return Run(make_mlp(), lr=0.5).govern(controller, **options)

    def parts(run: Run) -> dict[str, Any]:
        return {
            "network": run.network,
            "optimizer": run.optimizer,
            "scheduler": run.scheduler,
            "governor": run.governor,
        }

    whole = start("whole").train()
    first, file = start("parts").train(*range(6)), io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts(first).items()}, file)
    first.governor.close()
    file.seek(0)
    saved, second = torch.load(file, weights_only=True), start("parts")
    for name, part in parts(second).items():  # the governor last
        part.load_state_dict(saved[name])
    second.train(*range(6, STEPS))
    whole.governor.close()
    second.governor.close()
    assert same(second.bits(), whole.bits())
    assert (tmp_path / "parts").read_text() == (tmp_path / "whole").read_text()


# ---- the loss, where the loop does not tell it


def test_the_loss_that_a_closure_returns_is_seen(make_mlp):
    run, controller, losses = Run(make_mlp()), Scripted(), []

    def closure() -> torch.Tensor:
        run.optimizer.zero_grad()
        loss = run.loss(len(losses))
        loss.backward()
        losses.append(loss.item())
        return loss

    with Governor(run.optimizer, controller):
        for _ in range(4):
            run.optimizer.step(closure)
    assert [t.loss for t in controller.seen] == pytest.approx(losses, rel=1e-6)


def test_a_loop_that_tells_no_loss_is_governed_without_one(make_mlp):
    run, controller = Run(make_mlp()), Scripted()
    with Governor(run.optimizer, controller):
        for number in range(3):
            run.loss(number).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert all(math.isnan(t.loss) and t.grad_norm > 0 and t.nonfinite == 0 for t in controller.seen)


# ---- the norm before clipping


@pytest.fixture
def _torch_s_own() -> None:
    """Governors of other tests, never closed, may listen still."""
    for tap in list(clip_tap._listeners):
        tap.close()
    clip_tap._uninstall()


def seen_norm(run: Run, clip: Any, told: bool = False) -> float:
    """The norm that a decision sees after one backward pass and `clip`."""
    run.loss(0).backward()
    controller = Scripted()
    with Governor(run.optimizer, controller) as governor:
        norm = clip(run.network)
        governor.observe(grad_norm=norm if told else None)
        run.optimizer.step()
    return controller.seen[0].grad_norm


def norm_of(network: torch.nn.Module) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]).item()


@pytest.mark.parametrize(
    "clip",
    [
        lambda network: torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP),
        lambda network: torch.nn.utils.clip_grad_norm_(list(network.parameters()), max_norm=CLIP, foreach=False),
        lambda network: torch.nn.utils.clip_grad.clip_grad_norm_(network.parameters(), CLIP, 2, True),
    ],
    ids=["generator", "list", "other-name"],
)
def test_torch_s_own_clipping_is_overheard(clip, make_mlp):
    run, alone = Run(make_mlp()), Run(make_mlp())
    norm = seen_norm(run, clip)
    alone.loss(0).backward()
    expected = clip(alone.network).item()
    assert norm == pytest.approx(expected, rel=1e-6)
    assert norm > 2 * CLIP
    assert norm_of(run.network) == norm_of(alone.network) <= CLIP * (1 + 1e-5)  # clipped as without us


@pytest.mark.usefixtures("_torch_s_own")
def test_a_clipping_imported_by_name_goes_unheard_until_the_loop_tells_its_norm(make_mlp):
    from torch.nn.utils import clip_grad_norm_  # before there is a governor

    def clip(network: torch.nn.Module) -> torch.Tensor:
        return clip_grad_norm_(network.parameters(), CLIP)

    assert seen_norm(Run(make_mlp()), clip) == pytest.approx(CLIP, rel=1e-4)
    assert seen_norm(Run(make_mlp()), clip, told=True) > 2 * CLIP


def test_what_is_no_global_l2_norm_is_not_taken_for_one(make_mlp):
    largest = 1e9  # clips nothing, so that the gradients that the optimizer gets have the norm themselves
    whole = seen_norm(Run(make_mlp()), lambda network: None)
    for clip in (
        lambda network: torch.nn.utils.clip_grad_norm_(network.parameters(), largest, norm_type=math.inf),
        lambda network: torch.nn.utils.clip_grad_norm_(network[0].parameters(), largest),
        lambda network: torch.nn.utils.clip_grad_norm_(network[0].weight, largest),
        lambda network: torch.nn.utils.clip_grad_value_(network.parameters(), largest),
    ):
        assert seen_norm(Run(make_mlp()), clip) == pytest.approx(whole, rel=1e-6)


def test_each_governor_hears_its_own_optimizer_s_clipping(make_mlp):
    runs, controllers = [Run(make_mlp(), lr) for lr in (0.1, 0.2)], [Scripted(), Scripted()]
    expected = []
    with Governor(runs[0].optimizer, controllers[0]), Governor(runs[1].optimizer, controllers[1]):
        for number, run in enumerate(runs):
            run.loss(number).backward()
            expected.append(torch.nn.utils.clip_grad_norm_(run.network.parameters(), CLIP).item())
        for run in runs:
            run.optimizer.step()
    assert [c.seen[0].grad_norm for c in controllers] == pytest.approx(expected, rel=1e-6)
    assert expected[0] != expected[1]


@pytest.mark.usefixtures("_torch_s_own")
def test_the_last_governor_to_go_puts_torch_s_function_back(make_mlp):
    original = torch.nn.utils.clip_grad_norm_
    runs = [Run(make_mlp()).govern("constant") for _ in range(2)]
    assert torch.nn.utils.clip_grad_norm_ is not original
    runs[0].governor.close()
    runs[0].governor.close()
    runs[1].train(0)  # still heard
    assert runs[1].governor.last_telemetry.grad_norm == pytest.approx(runs[1].norms[0], rel=1e-6)
    runs[1].governor.close()
    assert torch.nn.utils.clip_grad_norm_ is torch.nn.utils.clip_grad.clip_grad_norm_ is original
