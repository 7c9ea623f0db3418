"""Optimizers of other packages: the same bits as their bare use, resumed or watched, and harmless under a governor."""

import copy
import io
import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from test_run import Interruption, same_weights, timeless

from lbw_rl import Action, Authority, Controller, Directive, Governor
from lbw_rl.envs.optim import build_optimizer
from lbw_rl.envs.recipe import OptimizerSpec, Recipe, RecipeError, load_recipe, override
from lbw_rl.envs.rivals import evaluation_weights
from lbw_rl.envs.task import TrainingTask
from lbw_rl.training_runs.run import run

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="needs the extra lbw-rl[rivals]")
schedulefree = pytest.importorskip("schedulefree", reason="needs the extra lbw-rl[rivals]")
prodigyopt = pytest.importorskip("prodigyopt", reason="needs the extra lbw-rl[rivals]")
pytest.importorskip("zclip", reason="needs the extra lbw-rl[rivals]")

RIVALS = {
    "stable-adamw": ["optimizer.name=stable-adamw"],
    "schedule-free": ["optimizer.name=schedule-free", "schedule.name=constant"],
    "prodigy": ["optimizer.name=prodigy", "optimizer.lr=1.0"],
    "zclip": ["optimizer.adaptive_clip=zclip", "optimizer.grad_clip=1.0"],
    "adagc": ["optimizer.adaptive_clip=adagc"],
    "greedy": ["schedule.name=greedy"],
    "plateau": ["schedule.name=plateau"],
}
OPTIMIZERS = ("stable-adamw", "schedule-free", "prodigy")


@pytest.fixture(params=RIVALS)
def rival(request) -> list[str]:
    """Every rival's settings in turn."""
    return RIVALS[request.param]


@pytest.fixture
def recipe(tiny):
    def make(*overrides: str) -> Recipe:
        return override(load_recipe("mini-qwen2"), [*tiny, *overrides])

    return make


def advance(task: TrainingTask, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss, _ = task.backward()
        task.advance()
        losses.append(loss.item())
    return losses


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- each is its package's own optimizer


def bare(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer as its package's README builds it, decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if name == "stable-adamw":
        return pytorch_optimizer.StableAdamW(groups, lr=3e-3, betas=(0.9, 0.95), kahan_sum=False)
    if name == "schedule-free":
        return schedulefree.AdamWScheduleFree(groups, lr=3e-3, betas=(0.9, 0.95), warmup_steps=4)
    return prodigyopt.Prodigy(groups, lr=1.0, betas=(0.9, 0.95), safeguard_warmup=True, use_bias_correction=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_have_the_bits_of_the_package_s_bare_use(name, recipe):
    """Schedule-Free's warmup, too: the recipe's schedule warms up to the bits of its own `warmup_steps`."""
    lr = "1.0" if name == "prodigy" else "3e-3"
    warmup = 4 if name == "schedule-free" else 0
    task = TrainingTask(
        recipe(
            *RIVALS[name],
            "schedule.name=constant",
            f"schedule.warmup_steps={warmup}",
            f"optimizer.lr={lr}",
            "optimizer.betas=[0.9, 0.95]",
            "optimizer.weight_decay=0.1",
            "train.steps=10",
        )
    )
    model = copy.deepcopy(task.model)
    optimizer = bare(name, model)
    for step in range(10):
        if name == "schedule-free":
            optimizer.train()
        tokens = task._batches(step, 0)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert advance(task, 1) == [loss.item()]
    assert equal(weights(task.model), weights(model))
    if name == "schedule-free":
        trained_at = weights(task.model)
        held_out = task.evaluate()
        optimizer.eval()
        task.model.load_state_dict(model.state_dict())
        task.optimizer.param_groups[:] = []  # nothing to swap: what is judged is x itself
        assert held_out == task.evaluate()
        assert not equal(trained_at, weights(model))


def test_stable_adamw_is_adamw_with_the_rate_cut_by_the_surprise():
    """p ← (1 − η′λ)·p − η′·m̂/(√v̂ + ε), η′ = η / max(1, RMS(g²/v̂)), in float64 and torch's textbook form of Adam."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 4, dtype=torch.float64)
    spec = OptimizerSpec(name="stable-adamw", weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    optimizer = build_optimizer(spec, layer, lr=0.1)
    p = layer.weight.detach().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    cuts = []
    for t in range(1, 11):
        g = torch.randn_like(p) * (30.0 if t == 6 else 1.0)
        layer.weight.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.99**t)
        cuts.append(max(1.0, (g * g / v_hat).mean().sqrt().item()))
        eta = 0.1 / cuts[-1]
        p = (1 - eta * 0.1) * p - eta * m_hat / (v_hat.sqrt() + 1e-8)
        torch.testing.assert_close(layer.weight.detach(), p, rtol=1e-12, atol=1e-12)
    assert cuts[0] == pytest.approx(1.0)
    assert cuts[5] == max(cuts) > 2.0


def test_prodigy_says_nothing_on_standard_output(capfd, recipe):
    advance(TrainingTask(recipe(*RIVALS["prodigy"])), 1)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_for_matrices_and_frozen_weights_stay_out(name):
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    spec = OptimizerSpec(name=name, weight_decay=0.1, betas=(0.8, 0.9), implementation="plain")
    decayed, plain = build_optimizer(spec, model, lr=0.5).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4)]
    assert len(plain["params"]) == 3
    assert (decayed["lr"], decayed["betas"]) == (0.5, (0.8, 0.9))


# ---- Schedule-Free's two points


def test_an_evaluation_between_steps_leaves_no_bit_behind(recipe):
    settings = RIVALS["schedule-free"]
    watched, alone = TrainingTask(recipe(*settings)), TrainingTask(recipe(*settings))
    for _ in range(6):
        watched.evaluate()
        assert advance(watched, 1) == advance(alone, 1)
        watched.evaluate()
    assert equal(weights(watched.model), weights(alone.model))
    assert watched.model.training
    assert all(group["train_mode"] for group in watched.optimizer.param_groups)


def test_an_evaluation_that_fails_puts_the_weights_back_too(recipe):
    task = TrainingTask(recipe(*RIVALS["schedule-free"]))
    advance(task, 3)
    before = weights(task.model)
    evaluating = ExitStack()
    evaluating.enter_context(evaluation_weights(task.optimizer))
    assert not equal(weights(task.model), before)
    evaluating.__exit__(KeyError, KeyError(), None)
    assert equal(weights(task.model), before)


def test_the_saved_model_is_the_averaged_one(recipe, tmp_path):
    task = TrainingTask(recipe(*RIVALS["schedule-free"]))
    advance(task, 5)
    task.save_pretrained(tmp_path)
    loaded = TrainingTask(recipe(f"model.path={tmp_path}", "data.tokenizer=model"))
    assert loaded.evaluate() == task.evaluate()
    with evaluation_weights(task.optimizer):
        assert equal(weights(loaded.model), weights(task.model))
    assert not equal(weights(loaded.model), weights(task.model))


# ---- resume


def test_a_resumed_task_equals_the_uninterrupted_one_bit_for_bit(rival, recipe):
    settings = recipe(*rival, "train.steps=40", "optimizer.lr=0.05")
    straight = TrainingTask(settings)
    losses = advance(straight, 40)
    interrupted = TrainingTask(settings)
    assert advance(interrupted, 28) == losses[:28]  # past ZClip's 25 steps
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed = TrainingTask(settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert advance(resumed, 12) == losses[28:]
    assert equal(weights(resumed.model), weights(straight.model))
    assert resumed.evaluate() == straight.evaluate()
    assert resumed.optimizer.param_groups[0]["lr"] == straight.optimizer.param_groups[0]["lr"]


def test_a_governed_run_that_was_killed_ends_as_the_one_that_was_not(rival, recipe, tmp_path):
    chosen = recipe(
        *rival,
        "controller.name=lbw-guard",
        "train.steps=14",
        "train.eval_every=2",
        "train.checkpoint_every=3",
        "train.measure_device=false",
        "authority.max_rollbacks=2",
    )

    def interrupt(done: int, total: int, loss: float) -> None:
        if done in (1, 8):  # in warmup, before a checkpoint; and between two
            raise Interruption

    for resume in (False, True):
        with pytest.raises(Interruption):
            run(chosen, tmp_path / "resumed", resume=resume, progress=interrupt)
    run(chosen, tmp_path / "resumed", resume=True)
    run(chosen, tmp_path / "straight")
    assert same_weights(tmp_path / "resumed", tmp_path / "straight")
    assert timeless(tmp_path / "resumed") == timeless(tmp_path / "straight")


# ---- under a governor


def ledger(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return [r for r in records if r["type"] == "decision"]


def test_shadow_mode_changes_no_bit_and_govern_mode_does_no_harm(rival, recipe, tmp_path):
    chosen = recipe(*rival, "train.steps=10", "train.measure_device=false")
    with_guard = override(chosen, ["controller.name=lbw-guard"])
    plain = run(chosen, tmp_path / "off", mode="off")
    shadow = run(with_guard, tmp_path / "shadow", mode="shadow")
    assert same_weights(tmp_path / "off", tmp_path / "shadow")
    assert shadow["final_loss"] == plain["final_loss"]
    governed = run(with_guard, tmp_path / "govern")
    assert governed["governor"]["faults"] == {}
    assert governed["governor"]["interventions"] > 0
    assert math.isfinite(governed["final_loss_uncapped"])
    for record in ledger(tmp_path / "govern")[2:]:
        telemetry = record["telemetry"]
        assert telemetry["update_ratio"] > 0
        own_v = not set(rival) & {f"optimizer.name={name}" for name in OPTIMIZERS}
        assert ((telemetry["surprise"] is not None), (telemetry["sgd_rate"] is not None)) == (own_v, own_v)


@pytest.mark.parametrize("governed", [False, True], ids=["alone", "governed"])
def test_one_poisoned_gradient_ends_every_rival_unless_its_update_is_withheld(governed, rival, recipe):
    task = TrainingTask(recipe(*rival, "train.steps=8"))
    victim = next(task.model.parameters())
    victim.register_hook(lambda gradient: gradient * math.nan if task.step == 4 else gradient)
    mode = "govern" if governed else "off"
    with Governor(task.optimizer, "lbw-guard", total_steps=8, mode=mode, measure_device=False) as governor:
        while task.step < task.total_steps:
            loss, norm = task.backward()
            governor.observe(loss, grad_norm=norm)
            task.advance()
    assert all(bool(w.isfinite().all()) for w in weights(task.model)) == governed
    assert math.isfinite(task.evaluate()) == governed
    assert governor.summary()["skips"] == int(governed)
    if "optimizer.name=prodigy" in rival:
        assert math.isfinite(task.optimizer.param_groups[0]["d"])


def test_a_governor_hears_the_norm_before_adaptive_clipping(recipe, tmp_path):
    """At step 0, where weights are equal, both clippings report the norm of the run without clipping."""
    norms = {}
    for name, settings in {"none": [], "zclip": RIVALS["zclip"], "adagc": RIVALS["adagc"]}.items():
        run(recipe(*settings, "train.steps=1"), tmp_path / name)
        norms[name] = ledger(tmp_path / name)[0]["telemetry"]["grad_norm"]
    assert norms["zclip"] == pytest.approx(norms["none"], rel=1e-6)
    assert norms["adagc"] == pytest.approx(norms["none"], rel=1e-6)
    assert norms["none"] > 1.0  # else nothing was clipped


def test_schedule_free_s_swap_is_no_update(recipe, tmp_path):
    """The update ratio is y's, by hand, although the weights are swapped for an evaluation after every step."""
    chosen = recipe(*RIVALS["schedule-free"], "train.steps=5", "train.eval_every=1", "train.measure_device=false")
    run(chosen, tmp_path, mode="shadow")
    measured = [r["telemetry"]["update_ratio"] for r in ledger(tmp_path)]
    task = TrainingTask(chosen)
    for ratio in measured[1:]:
        before = [p.clone() for p in weights(task.model) if p.ndim >= 2]
        advance(task, 1)
        after = [p for p in weights(task.model) if p.ndim >= 2]
        moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, before)))
        size = math.sqrt(sum(float(b.square().sum()) for b in before))
        assert ratio == pytest.approx(moved / size, rel=0.05)  # a sample


class Scripted(Controller):
    """Answers from a list."""

    name = "scripted"

    def __init__(self, *answers: Action) -> None:
        self.answers = list(answers)

    def reset(self, context):
        pass

    def act(self, telemetry):
        return self.answers.pop(0) if self.answers else Action()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_withheld_step_moves_no_weight_and_a_rollback_restores_all_of_them(name, recipe):
    task = TrainingTask(recipe(*RIVALS[name], "train.steps=10"))
    proceed, skip = Action(), Action(directive=Directive.SKIP)
    script = Scripted(proceed, proceed, skip, proceed, Action(directive=Directive.ROLLBACK), proceed)
    authority = Authority(max_rollbacks=1, snapshot_every=3)
    with Governor(
        task.optimizer, script, authority=authority, stateful={"scheduler": task.scheduler}, measure_device=False
    ) as governor:
        states = []
        for _ in range(6):
            loss, _ = task.backward()
            governor.observe(loss)
            states.append((weights(task.model), copy.deepcopy(task.optimizer.state_dict())))
            task.advance()
        assert governor.summary()["rollbacks"] == governor.summary()["skips"] == 1
        assert governor.summary()["faults"] == {}
    assert equal(states[2][0], states[3][0])  # the skip
    assert not equal(states[4][0], states[3][0])
    assert equal(states[5][0], states[3][0])  # the rollback
    for now, then in zip(states[5][1]["param_groups"], states[3][1]["param_groups"], strict=True):
        for key in {"k", "lr_max", "d", "d_max", "d_numerator", "step"} & set(then):
            # The step that the rollback itself withholds still counts, but not for Prodigy.
            counts = key in ("k", "step") and name != "prodigy"
            assert now[key] == then[key] + counts


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["optimizer.name=schedule-free"], "schedule.name 'cosine' does not go with optimizer.name 'schedule-free'"),
        (["optimizer.name=prodigy", "optimizer.per_tensor=true"], "per_tensor does not go with prodigy"),
        (["optimizer.name=prodigy", "controller.options.micro=true"], "controller.options.micro does not go with"),
        (
            ["optimizer.name=prodigy", "optimizer.implementation=fused"],
            "implementation 'fused' does not exist for prod",
        ),
        (
            ["optimizer.adaptive_clip=adagc", "optimizer.grad_clip=1.0"],
            "grad_clip does not go with adaptive_clip 'adagc'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(settings, reason):
    with pytest.raises(RecipeError) as refused:
        override(load_recipe("mini-qwen2"), settings)
    assert reason in str(refused.value)
    assert "accepted: " in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("stable-adamw", "pytorch_optimizer"),
        ("schedule-free", "schedulefree"),
        ("prodigy", "prodigyopt"),
        ("zclip", "zclip"),
    ],
)
def test_a_missing_package_names_the_extra(name, package, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^[a-z-]+ is not installed; accepted: pip install 'lbw-rl\[rivals\]'$"
    ):
        TrainingTask(recipe(*RIVALS[name]))
