"""The benchmarks that take the law apart and that train with Trainer, on models of a few thousand weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")

from lbw_rl import Context, Telemetry
from lbw_rl.controllers.lbw_guard import LBWGuard
from lbw_rl.controllers.ppo import newest_pretrained
from lbw_rl.envs.recipe import load_recipe
from lbw_rl.training_runs.benchmarks import ablation, in_trainer
from lbw_rl.update_target import DISPLACEMENT

CONTEXT = Context(total_steps=400, weights=10_000, momentum=0.9)


def proposals(
    controller: LBWGuard, context: Context = CONTEXT, surprise: float = 1.0, grad_norm: float = 20.0
) -> list[tuple[float, float]]:
    """What a controller asks for on a run of 400 steps whose plant wavers, and which surprises from step 200 on.

    With these weights a gradient norm of 20 is 40 nats: the steepness binds.
    """
    controller.reset(context)
    scale, momentum_scale, ratio, asked = 1.0, 1.0, math.nan, []
    for step in range(400):
        rate = 1e-3 * (1.0 - 0.9 * step / 400)
        telemetry = Telemetry(
            step=step,
            progress=step / 400,
            loss=2.0,
            grad_norm=grad_norm,
            weight_rms=0.02,
            learning_rate=rate,
            lr_scale=scale,
            momentum=0.9,
            momentum_scale=momentum_scale,
            update_ratio=ratio,
            surprise=surprise if step >= 200 else 1.0,
            nonfinite=0.0,
        )
        action = controller.act(telemetry)
        scale, momentum_scale = action.lr_scale, max(0.5, action.momentum_scale)
        ratio = scale * rate * (1.0 + 0.3 * math.sin(step))
        asked.append((scale, action.momentum_scale))
    return asked


@pytest.mark.parametrize("variant", [v for v in ablation.VARIANTS if v not in ("whole", "no-alarms", "no-skips")])
def test_every_part_that_can_be_left_out_was_at_work(variant: str) -> None:
    context = Context(total_steps=400, weights=10_000, momentum=0.9, low_rank=variant == "adapters-as-others")
    whole, without = (proposals(ablation.VARIANTS[name][1](), context) for name in ("whole", variant))
    assert without != whole
    assert all(math.isfinite(x) for pair in without for x in pair)


def test_without_alarms_and_skips_nothing_is_cut_and_nothing_withheld() -> None:
    whole, deaf = LBWGuard(), ablation.VARIANTS["no-alarms"][1]()
    assert proposals(deaf, surprise=9.0) != proposals(whole, surprise=9.0)
    bold, guarded = ablation.VARIANTS["no-skips"][1](), LBWGuard()
    for controller in (bold, guarded):
        proposals(controller)
    burst = Telemetry(step=400, loss=2.0, grad_norm=1e4, nonfinite=0.0, learning_rate=1e-3, progress=0.9)
    assert guarded.act(burst).directive == "skip"
    assert bold.act(burst).directive == "proceed"


def test_parts_that_are_left_alone_work_as_in_the_whole_law() -> None:
    """300 stand for every horizon, so that a run of 300 steps is the same; and so on."""
    context = Context(total_steps=300, weights=10_000, momentum=0.9)
    whole, any_horizon = LBWGuard(), ablation.VARIANTS["any-horizon"][1]()
    assert proposals(whole, context) == proposals(any_horizon, context)
    assert proposals(ablation.VARIANTS["adapters-as-others"][1]()) == proposals(LBWGuard())
    gentle = ablation.VARIANTS["any-steepness"][1]()
    assert proposals(gentle, grad_norm=1.0) == proposals(LBWGuard(), grad_norm=1.0)
    linear = ablation.VARIANTS["linear-fall"][1]()
    t = Telemetry(step=100, progress=0.25, learning_rate=1e-3, momentum=0.9, momentum_scale=0.5)
    for controller, share in ((linear, 0.75), (LBWGuard(), math.sqrt(0.75))):
        controller.reset(CONTEXT)
        assert controller._target.ratio(t) == pytest.approx(DISPLACEMENT / math.sqrt(400 * 5) * share)


def test_effects_are_paired_by_multiplier_and_seed() -> None:
    def row(variant: str, multiplier: float, seed: int, loss: float) -> dict[str, object]:
        return {
            "family": "f", "variant": variant, "multiplier": multiplier, "seed": seed, "final_loss": loss,
            "diverged": loss > 6, "skips": 1,
        }  # fmt: skip

    rows = [row("whole", 1, 0, 4.0), row("whole", 30, 0, 4.2), row("whole", 1, 1, 5.0), row("whole", 30, 1, 5.2)]
    rows += [row("x", 1, 0, 4.1), row("x", 30, 0, 4.3), row("x", 1, 1, 5.3), row("x", 30, 1, 6.5)]
    (effect,) = ablation.effects(rows)
    assert effect["difference"] == pytest.approx((0.1 + (0.3 + 1.3) / 2) / 2)
    assert effect["sensitivity"] == pytest.approx((4.7 + 5.4) / 2 - 4.7)
    assert effect["whole_sensitivity"] == pytest.approx((4.5 + 4.7) / 2 - 4.5)
    assert effect["seeds"] == 2
    assert effect["diverged"] == 1
    assert effect["skips"] == 4
    low, high = effect["interval"]
    assert low <= effect["difference"] <= high


@pytest.mark.slow
def test_ablation_is_complete_and_resumes(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablation, "FAMILIES", {"tiny": ("mini-qwen2", (*tiny, "train.steps=12"))})
    found = ablation.benchmark(tmp_path, ["tiny"], ["no-ramp", "no-fall"], [1.0, 30.0], 2, workers=1)
    assert len(found["rows"]) == 3 * 2 * 2
    assert {e["variant"] for e in found["effects"]} == {"no-ramp", "no-fall"}
    again = ablation.benchmark(tmp_path, ["tiny"], ["no-ramp", "no-fall"], [1.0, 30.0], 2, workers=1)
    assert again["rows"] == found["rows"]
    assert json.loads((tmp_path / "results.json").read_text())["effects"] == json.loads(json.dumps(found["effects"]))
    monkeypatch.setattr("sys.argv", ["ablation", "--variants", "no-brakes"])
    with pytest.raises(SystemExit):
        ablation.main()
    assert "variants: 'no-brakes' is unknown; accepted: whole, " in capsys.readouterr().err


def test_passages_of_a_ledger() -> None:
    def ledger(scales: list[float]) -> list[dict[str, object]]:
        return [{"type": "header"}, *({"type": "decision", "executed": {"lr_scale": s}} for s in scales)]

    assert in_trainer.passages(ledger([1.0, 4.0] * 6)) == pytest.approx([2.0] * 6)
    assert in_trainer.passages(ledger([1.0, 3.0])) == [1.0, pytest.approx(3.0)]


def test_in_trainer_another_policy_in_the_same_folder_is_another_arm(tmp_path: Path) -> None:
    recipe, folder = load_recipe("mini-qwen2-1m"), str(tmp_path / "policy")
    keys = []
    for kind in ("ppo", "direct"):
        shutil.copytree(newest_pretrained(kind), folder, dirs_exist_ok=True)
        keys.append([in_trainer.Cell(arm, 1.0, recipe, "").key for arm in (folder, "lbw-guard")])
    assert keys[0][0] != keys[1][0]
    assert keys[0][1] == keys[1][1]


@pytest.mark.slow
def test_in_trainer_arms_share_weights_and_batches(tiny: list[str], tmp_path: Path) -> None:
    """Ungoverned it is the same run whoever else is there, and a governed one leaves a ledger."""
    settings = [*tiny, "train.steps=8"]
    found = in_trainer.benchmark(tmp_path, ["ungoverned", "lbw-guard"], [1.0], 1, settings=settings, workers=1)
    alone, governed = found["rows"]
    assert alone["parameters"] == governed["parameters"]
    assert alone["scales"] is None
    assert len(governed["scales"]) == in_trainer.PASSAGES
    assert alone["final_loss"] != governed["final_loss"]
    assert len(list((tmp_path / "ledgers").iterdir())) == 1
    again = in_trainer.benchmark(tmp_path / "b", ["ungoverned"], [1.0], 1, settings=settings, workers=1)
    assert again["rows"][0]["final_loss"] == alone["final_loss"]
    assert "lbw-guard" in str(in_trainer.render(found["rows"]).columns[0]._cells)
