"""A training loop under Accelerate, against Accelerate alone and against the same loop without it."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

accelerate = pytest.importorskip("accelerate", reason="needs the extra lbw-rl[hf]")

from accelerate.utils import GradientAccumulationPlugin, set_seed  # noqa: E402

from lbw_rl import Action, Authority, Controller, Directive, Governor  # noqa: E402
from lbw_rl.action import NEUTRAL  # noqa: E402

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0))
BATCHES, ACCUMULATE, CLIP = 16, 2, 0.05
STEPS = BATCHES // ACCUMULATE


class Scripted(Controller):
    """Proposes what the test says, in order, then nothing; keeps what it saw."""

    name = "scripted"

    def __init__(self, *script: Action):
        self.script, self.seen = list(script), []

    def reset(self, context: Any) -> None:
        self.context = context

    def act(self, telemetry: Any) -> Action:
        self.seen.append(telemetry)
        return self.script[len(self.seen) - 1] if len(self.seen) <= len(self.script) else NEUTRAL


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings in singletons."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    """Everything that `accelerator.prepare` gave, and a loop as a user writes it."""

    def __init__(self, network: torch.nn.Module, lr: float = 0.05, fused: bool = False, **options: Any):
        plugin = GradientAccumulationPlugin(num_steps=ACCUMULATE, sync_with_dataloader=False)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_plugin=plugin, **options)
        set_seed(0)
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(4 * BATCHES, 8, generator=generator), torch.randn(4 * BATCHES, 3, generator=generator)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, fused=fused)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        self.network, self.raw = network, optimizer
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            network, optimizer, loader, scheduler
        )
        self.governor: Governor | None = None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.history: list[Any] = []  # before each optimizer step
        self.rates: list[float] = []
        self.poisoned: set[int] = set()

    def govern(self, controller: Any = "lbw-guard", **options: Any) -> "Run":
        self.governor = Governor(
            self.optimizer,
            controller,
            model=self.model,
            total_steps=STEPS,
            stateful={"scheduler": self.scheduler},
            **({"authority": WIDE, "measure_device": False} | options),
        )
        return self

    def train(self, start: int = 0, stop: int = BATCHES) -> "Run":
        loader = self.accelerator.skip_first_batches(self.loader, start) if start else self.loader
        for batch, (x, y) in zip(range(start, stop), loader, strict=False):
            with self.accelerator.accumulate(self.model):
                loss = torch.nn.functional.mse_loss(self.model(x), y)
                self.losses.append(loss.item())
                if self.governor is not None:
                    self.governor.observe(loss)
                self.accelerator.backward(loss * math.nan if batch in self.poisoned else loss)
                if self.accelerator.sync_gradients:
                    self.history.append(self.bits())
                    self.rates.append(self.optimizer.param_groups[0]["lr"])
                    self.norms.append(self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP).item())
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self

    def bits(self) -> Any:
        state = [list(self.raw.state.get(p, {}).values()) for p in self.network.parameters()]
        return copy.deepcopy(([p.detach() for p in self.network.parameters()], state))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def without_accelerate(network: torch.nn.Module, ledger: Path, controller: str, lr: float) -> Any:
    """The same training on torch alone; what Accelerate's loop lets the governor overhear is told here."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4 * BATCHES, 8, generator=generator), torch.randn(4 * BATCHES, 3, generator=generator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, fused=False)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    options = {"total_steps": STEPS, "authority": WIDE, "measure_device": False, "ledger": ledger}
    with Governor(optimizer, controller, **options) as governor:
        for batch in range(BATCHES):
            rows = slice(4 * batch, 4 * batch + 4)
            loss = torch.nn.functional.mse_loss(network(x[rows]), y[rows])
            governor.observe(loss)
            (loss / ACCUMULATE).backward()
            if (batch + 1) % ACCUMULATE == 0:
                governor.observe(grad_norm=torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return [p.detach() for p in network.parameters()]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_constant_and_shadow_and_off_leave_every_bit(fused, precision, make_mlp):
    def run(**governance: Any) -> Run:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        made = Run(make_mlp(), fused=fused, mixed_precision=precision)
        return (made.govern(**governance) if governance else made).train()

    alone = run()
    for governance in ({"controller": "constant"}, {"controller": "random", "mode": "shadow"}, {"mode": "off"}):
        governed = run(**governance)
        assert same(governed.bits(), alone.bits())
        assert governed.losses == alone.losses
        assert governed.rates == alone.rates
        assert governed.governor.summary()["decisions"] == (0 if governance.get("mode") == "off" else STEPS)
        governed.governor.close()


@pytest.mark.parametrize("controller", ["lbw-guard", "random"])
def test_it_decides_and_trains_as_the_loop_without_accelerate(controller, make_mlp, tmp_path):
    run = Run(make_mlp(), lr=1.0).govern(controller, ledger=tmp_path / "accelerate.jsonl").train()
    expected = without_accelerate(make_mlp(), tmp_path / "plain.jsonl", controller, lr=1.0)
    assert same(run.bits()[0], expected)
    assert (tmp_path / "accelerate.jsonl").read_text() == (tmp_path / "plain.jsonl").read_text()
    summary = run.governor.summary()
    assert summary["decisions"] == STEPS
    assert summary["interventions"] > 0
    assert not summary["faults"]


def test_the_prepared_optimizer_and_the_raw_one_are_governed_alike(make_mlp):
    results = []
    for of in (lambda run: run.optimizer, lambda run: run.raw):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        run = Run(make_mlp())
        with Governor(of(run), "random", authority=WIDE, total_steps=STEPS) as governor:
            assert governor.optimizer is run.raw
            results.append(run.train().bits())
            assert governor.summary()["decisions"] == STEPS
    assert same(*results)


def test_accumulation_decides_once_a_step_from_the_mean_of_the_raw_losses(make_mlp):
    controller = Scripted()
    run = Run(make_mlp()).govern(controller).train()
    means = [sum(run.losses[i : i + ACCUMULATE]) / ACCUMULATE for i in range(0, BATCHES, ACCUMULATE)]
    assert [t.loss for t in controller.seen] == pytest.approx(means, rel=1e-6)
    assert [t.step for t in controller.seen] == list(range(STEPS))
    assert run.governor.step == STEPS


def test_the_model_s_own_loss_is_read_where_nobody_observes(make_lm, tokens):
    plugin = GradientAccumulationPlugin(num_steps=2)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_plugin=plugin, mixed_precision="bf16")
    network = make_lm()
    model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters()))
    controller, losses = Scripted(), []
    with Governor(optimizer, controller, model=model):
        for step in range(6):
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens(step), labels=tokens(step)).loss
                losses.append(loss.item())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [t.loss for t in controller.seen] == pytest.approx(means, rel=1e-6)
    count = [t.tokens_per_second * t.step_seconds for t in controller.seen[1:]]
    assert count == pytest.approx([2 * tokens(0).numel()] * 2)


def test_the_gradient_norm_is_the_one_before_accelerate_clips(make_mlp):
    controller = Scripted()
    run = Run(make_mlp()).govern(controller).train()
    assert [t.grad_norm for t in controller.seen] == pytest.approx(run.norms, rel=1e-6)
    assert min(run.norms) > 2 * CLIP


def test_under_a_gradient_scaler_the_norm_is_the_unscaled_one_and_idle_moves_no_bit(make_mlp):
    def run(governed: bool) -> tuple[Run, Scripted, dict[str, Any]]:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        made, controller = Run(make_mlp()), Scripted()
        # On a GPU `mixed_precision="fp16"` brings the scaler; on the CPU Accelerate has none, so it is put in its place.
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        made.accelerator.scaler = scaler
        made.optimizer = accelerate.optimizer.AcceleratedOptimizer(made.raw, scaler=scaler)
        made.accelerator._optimizers[:] = [made.optimizer]
        made.scheduler.optimizers = [made.optimizer]
        if governed:
            made.govern(controller, mode="shadow")
        return made.train(), controller, scaler.state_dict()

    alone, _, expected = run(governed=False)
    governed, controller, scaler = run(governed=True)
    assert same(governed.bits(), alone.bits())
    assert scaler == expected
    assert [t.grad_norm for t in controller.seen] == pytest.approx(governed.norms, rel=1e-6)
    assert controller.seen[0].loss == pytest.approx(sum(governed.losses[:2]) / 2, rel=1e-6)
    governed.governor.close()


def test_a_skipped_step_changes_neither_weights_nor_moments(make_mlp):
    run = Run(make_mlp()).govern(Scripted(NEUTRAL, NEUTRAL, Action(directive=Directive.SKIP))).train()
    assert same(run.history[3], run.history[2])
    assert not same(run.history[2], run.history[1])
    assert not same(run.history[4], run.history[3])
    assert run.governor.summary()["skips"] == 1
    run.governor.close()


def test_a_poisoned_micro_batch_is_skipped_by_the_guard(make_mlp):
    run = Run(make_mlp())
    run.poisoned = {7}  # of the fourth step
    run.govern("lbw-guard").train()
    assert same(run.history[4], run.history[3])
    assert all(torch.isfinite(w).all() for w in run.bits()[0])
    assert run.governor.summary()["skips"] == 1
    run.governor.close()


def test_a_rollback_takes_weights_moments_and_schedule_back(make_mlp):
    script = [NEUTRAL] * 5 + [Action(directive=Directive.ROLLBACK)]
    run = Run(make_mlp()).govern(Scripted(*script), authority=Authority(max_rollbacks=1, snapshot_every=3)).train()
    assert run.governor.summary()["rollbacks"] == 1
    assert not run.governor.summary()["faults"]
    assert same(run.history[6], run.history[3])  # the snapshot of step 3
    assert not same(run.history[5], run.history[3])
    assert run.rates[6] == run.rates[4]  # the schedule went back to step 3, and the loop advanced it by one
    run.governor.close()


@pytest.mark.parametrize("controller", ["lbw-guard", "pid", "random"])
@pytest.mark.parametrize("every", [1, 3], ids=["each-step", "in-mid-window"])
def test_a_run_resumed_with_load_state_equals_the_uninterrupted_one_bit_for_bit(controller, every, make_mlp, tmp_path):
    def start(ledger: str) -> Run:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        authority = Authority(lr_scale=(1e-3, 100.0), max_rollbacks=2, snapshot_every=2)
        run = Run(make_mlp(), lr=0.5).govern(
            controller, decide_every=every, authority=authority, ledger=tmp_path / ledger
        )
        run.accelerator.register_for_checkpointing(run.governor)
        return run

    whole = start("whole").train()
    first = start("parts").train(stop=BATCHES // 2)
    first.accelerator.save_state(tmp_path / "state")
    first.governor.close()
    second = start("parts")
    second.accelerator.load_state(tmp_path / "state")
    second.train(start=BATCHES // 2)

    assert same(second.bits(), whole.bits())
    assert first.rates + second.rates == whole.rates
    whole.governor.close()
    second.governor.close()
    assert (tmp_path / "parts").read_text() == (tmp_path / "whole").read_text()
    summary, expected = second.governor.summary(), whole.governor.summary()
    for key in set(summary) - {"overhead_seconds"}:
        assert summary[key] == expected[key]


def test_the_governor_s_state_is_loaded_after_the_optimizer_s(make_mlp, tmp_path):
    """What `Governor.load_state_dict` asks for, and what Accelerate does, whatever order things were registered in."""
    run = Run(make_mlp())
    order: list[str] = []

    class Watching:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            order.append("registered")

    run.accelerator.register_for_checkpointing(Watching())
    run.raw.register_load_state_dict_post_hook(lambda *_: order.append("optimizer"))
    run.train(stop=4).accelerator.save_state(tmp_path)
    run.accelerator.load_state(tmp_path)
    assert order == ["optimizer", "registered"]


def test_it_lets_go_of_the_optimizer_inside(make_mlp):
    run = Run(make_mlp()).govern("random").train(stop=4)
    run.governor.close()
    assert not run.raw._optimizer_step_pre_hooks
    assert run.raw.param_groups[0]["lr"] == run.scheduler.get_last_lr()[0]
