"""Evaluation on tiers: what is paired with what, tuned rivals, the figures, and the command."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import schedulefree
import torch
from numpy.typing import NDArray
from one_model import fleet_of, reference
from typer.testing import CliRunner

from lbw_rl.action import Action
from lbw_rl.cli.app import app
from lbw_rl.controller import Context, Controller
from lbw_rl.controllers.open_loop import OpenLoop
from lbw_rl.envs.families.transformer import FleetShape
from lbw_rl.envs.mixture import ProxyKind
from lbw_rl.envs.proxy_data import BatchShape
from lbw_rl.envs.proxy_runs import ProxyData
from lbw_rl.envs.schedule_free import schedule_free_losses
from lbw_rl.envs.splits import SPLITS, split
from lbw_rl.envs.tasks import SCHEDULES, WIDE, Tasks, sample_tasks
from lbw_rl.features import FEATURES
from lbw_rl.signals import Telemetry
from lbw_rl.training_runs.evaluation import rollouts, session
from lbw_rl.training_runs.evaluation.device_arm import BesideADevice
from lbw_rl.training_runs.evaluation.report import read_evaluation
from lbw_rl.training_runs.evaluation.rollouts import MOMENTS, governed, open_loop, tuned_adamw, tuned_schedule_free
from lbw_rl.training_runs.evaluation.scores import PROFILE, score
from lbw_rl.training_runs.evaluation.session import POLICY, REFERENCE, evaluate
from lbw_rl.training_runs.evaluation.tiers import MULTIPLIERS, SEEDS, TIERS, Tier, tiers_named
from lbw_rl.training_runs.freeze import ship

SMALL = ProxyKind(
    shape=FleetShape(vocab=16, width=8, heads=1, ffn=8), batch=BatchShape(2, 4, 2), horizon=(16, 24), variety=WIDE
)
TIER = Tier("small", "nothing", SMALL, 3)
N = 3 * len(MULTIPLIERS) * SEEDS


# -- tiers -------------------------------------------------------------------------------------------


def test_a_tier_is_a_grid_of_tasks_multipliers_and_seeds() -> None:
    tasks = TIER.draw()
    assert len(tasks) == N
    shape = (3, len(MULTIPLIERS), SEEDS)
    assert tasks.lr_error.reshape(shape).tolist() == [[[m] * SEEDS for m in MULTIPLIERS]] * 3
    assert tasks.lr == pytest.approx(SMALL.shape.tuned_lr * tasks.lr_error)
    seeds = tasks.seed.reshape(shape)
    assert (seeds == seeds[:, :1]).all()  # paired over the multipliers
    assert len(np.unique(seeds)) == 3 * SEEDS
    for name in ("horizon", "schedule", "fault", "beta2", "corpus"):
        values = getattr(tasks, name).reshape(3, -1)
        assert (values == values[:, :1]).all()
    again = TIER.draw()
    assert (again.seed == tasks.seed).all()


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_what_a_tier_holds_out_was_never_trained_on(tier: Tier) -> None:
    found = {SPLITS[i] for i in split(tier.draw())}
    expected = {
        "validation": {"validation"},
        "validation on tokens": {"validation"},
        "adapters": {"test"},
        "corpus": {"test"},
    }
    assert found == expected.get(tier.name, {"train"})


def test_unknown_tiers_are_refused() -> None:
    assert tiers_named([]) == TIERS
    assert [t.name for t in tiers_named(["longer", "corpus"])] == ["longer", "corpus"]
    with pytest.raises(ValueError, match="tiers: 'wider' is unknown; accepted: in distribution, validation, "):
        tiers_named(["wider"])


# -- runs --------------------------------------------------------------------------------------------


def test_a_run_without_a_controller_ends_as_the_bare_optimizer_does() -> None:
    """Whatever the tasks' schedules, faults and rates, diverging ones included."""
    tasks = TIER.draw()
    tasks = replace(tasks, lr=tasks.lr * np.where(tasks.lr_error > 1, 30.0, 1.0))
    ends = governed(SMALL, tasks, "constant")
    data = ProxyData(N, int(tasks.horizon.max()), SMALL.shape, SMALL.batch)
    data.put(range(N), tasks)
    losses, lost = rollouts.ungoverned(data)
    assert ends.losses == pytest.approx(losses, rel=1e-5)
    assert (ends.diverged == lost).all()
    assert lost.any()
    assert (ends.scales == 0.0).all()


def test_every_run_under_a_rule_has_a_controller_of_its_own() -> None:
    tasks = TIER.draw()
    together = governed(SMALL, tasks, "lbw-guard")
    rows = np.array([0, 7])
    apart = governed(SMALL, tasks.take(rows), "lbw-guard")
    assert apart.losses == pytest.approx(together.losses[rows], rel=1e-4)
    assert apart.scales == pytest.approx(together.scales[rows], rel=1e-2, abs=1e-2)
    assert (together.scales != 0.0).any()


def test_a_replayed_path_is_the_mean_at_the_right_rate() -> None:
    tasks = TIER.draw()
    scales = np.random.default_rng(0).normal(size=(N, MOMENTS))
    controller = open_loop(scales, tasks)
    assert isinstance(controller, OpenLoop)
    right = scales[np.isclose(tasks.lr_error, 1.0)].mean(axis=0)
    (recording,) = controller._recordings
    assert recording.log_scale == pytest.approx(right)


def test_tuned_adamw_is_the_best_of_its_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every candidate, run again by itself."""
    monkeypatch.setattr(rollouts, "RATES", (0.3, 3.0))
    monkeypatch.setattr(rollouts, "FINER", (0.5, 1.0))
    ends, settings = tuned_adamw(TIER)
    losses = ends.losses.reshape(3, len(MULTIPLIERS), SEEDS)
    assert (losses == losses[:, :1]).all()  # its rate is not the task's
    tasks = TIER.draw()
    for t, setting in enumerate(settings):
        rows = tasks.take(t * len(MULTIPLIERS) * SEEDS + np.arange(SEEDS))

        def mean(rate: float, schedule: int, of: Tasks) -> float:
            lr = np.full(len(of), rate)
            at = replace(of, lr=lr * SMALL.shape.tuned_lr, lr_error=lr, schedule=np.full(len(of), schedule))
            return float(governed(SMALL, at, "constant").losses.mean())

        first = {(r, s): mean(r, s, rows.take(np.array([0]))) for r in (0.3, 3.0) for s in range(len(SCHEDULES))}
        rate, schedule = min(first, key=lambda candidate: first[candidate])
        finer = {rate * f: mean(rate * f, schedule, rows) for f in (0.5, 1.0)}
        assert setting == {"rate": pytest.approx(min(finer, key=lambda r: finer[r])), "schedule": SCHEDULES[schedule]}
        assert losses[t, 0].mean() == pytest.approx(min(finer.values()), rel=1e-5)


def test_schedule_free_fleet_is_the_packages_own_optimizer() -> None:
    tasks = sample_tasks(np.random.default_rng(3), 4, horizon=(20, 20), well_tuned=1.0)
    data = ProxyData(4, 20, SMALL.shape, SMALL.batch)
    data.put(range(4), tasks)
    losses, lost = schedule_free_losses(data)
    assert not lost.any()
    for row in range(4):
        fleet = fleet_of(4, SMALL.shape)
        fleet.reset([row], [tasks.generator(row, 1)], tasks.init_scale[[row]])
        model, loss_of = reference(fleet, row)
        optimizer = schedulefree.AdamWScheduleFree(
            model.parameters(),
            lr=float(tasks.lr[row]),
            betas=(float(tasks.beta1[row]), float(tasks.beta2[row])),
            weight_decay=float(tasks.weight_decay[row]),
            warmup_steps=int(tasks.warmup[row]),
        )
        optimizer.train()
        for step in range(int(tasks.horizon[row])):
            optimizer.zero_grad()
            loss_of(data.batches[row, step]).backward()
            if np.isfinite(tasks.clip[row]):
                torch.nn.utils.clip_grad_norm_(model.parameters(), float(tasks.clip[row]))
            optimizer.step()
        optimizer.eval()
        with torch.no_grad():
            assert losses[row] == pytest.approx(loss_of(data.held_out[row]).item(), rel=1e-4)


def test_schedule_free_is_tuned_for_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "RATES", (0.1, 1.0))
    monkeypatch.setattr(rollouts, "FINER", (1.0,))
    ends, settings = tuned_schedule_free(TIER)
    assert {s["schedule"] for s in settings} == {"none"}
    assert ends.losses.shape == (N,)
    assert np.isfinite(ends.losses).all()


# -- figures -----------------------------------------------------------------------------------------


ZEROS = np.zeros((1, 6, 3, 2), dtype=bool)


def test_figures_of_arms_whose_answer_is_known() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(4.0, 0.5, (1, 6, 3, 2))
    lost = base.copy()
    lost[0, 0, 0, 0] += 1e9  # one run: the mean of the middle half passes over it
    losses = {
        "reference": base,
        "better": base - 0.1,
        "lost": lost,
        "steep": base + np.array([0.6, 0.0, 0.3])[:, None],
        "policy": np.concatenate([base - 0.3, base - 0.1]),
    }
    found = score(losses, dict.fromkeys(losses, ZEROS), "reference", "policy")
    assert found["better"]["iqm"] == pytest.approx(-0.1)
    assert found["better"]["iqm_interval"] == pytest.approx([-0.1, -0.1])
    assert found["lost"]["iqm"] == 0.0
    policy = found["policy"]
    assert policy["iqm"] == pytest.approx(-0.2)
    assert policy["iqm_interval"] == pytest.approx([-0.3, -0.1])  # policies are drawn anew as well
    assert policy["against"]["better"]["iqm"] == pytest.approx(-0.1)
    assert policy["against"]["reference"]["improves"] == 1.0
    assert not any("against" in figures for arm, figures in found.items() if arm != "policy")
    assert found["steep"]["lr_sensitivity"] - found["reference"]["lr_sensitivity"] > 0.1
    at = dict(zip(PROFILE, found["better"]["profile"], strict=True))
    assert (at[-0.15], at[-0.05], at[1.0]) == (0.0, 1.0, 1.0)


def test_intervals_draw_tasks_anew_and_keep_the_multipliers_of_each() -> None:
    """Tasks that differ widen the interval; multipliers that differ, alike in every task, do not."""
    reference = np.zeros((1, 8, 3, 2))
    by_task = reference + np.linspace(-1, 1, 8)[:, None, None]
    by_multiplier = reference + np.array([-1.0, 0.0, 1.0])[:, None]
    losses = {"reference": reference, "by task": by_task, "by multiplier": by_multiplier}
    found = score(losses, dict.fromkeys(losses, np.zeros((1, 8, 3, 2), bool)), "reference", "by task")
    low, high = found["by task"]["iqm_interval"]
    assert low < -0.2 < 0.2 < high
    assert found["by multiplier"]["iqm_interval"] == pytest.approx([0.0, 0.0])
    assert found["by task"]["against"]["reference"]["improves"] == 0.5


# -- the command -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluate_judges_resumes_and_reports(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = [policy_folder, tmp_path / "twin"]
    shutil.copytree(policy_folder, policies[1])
    found = evaluate(policies, [TIER], tmp_path / "out", ablate=True, workers=2)
    arms = found["tiers"]["small"]
    assert {POLICY, REFERENCE, "LBW-Guard-style", "PID", "EntroPIC", session.REPLAY} <= set(arms)
    assert {f"policy blind to {group}" for group in session.SIGNAL_GROUPS} <= set(arms)
    assert f"policy {session.BESIDE_A_DEVICE}" in arms
    assert {"policy of a single frame", *(f"policy deciding every {k} steps" for k in session.OTHER_PACES)} <= set(arms)
    assert list(found["policies"]) == [str(p) for p in policies]
    assert arms[REFERENCE]["iqm"] == 0.0
    assert arms["AdamW at the task's rate"]["iqm"] > 0.0  # one of its three rates is right at best
    files = sorted((tmp_path / "out/ends").iterdir())
    stamps = [f.stat().st_mtime_ns for f in files]
    again = evaluate(policies, [TIER], tmp_path / "out", ablate=True, resume=True, workers=1)
    assert again["tiers"] == found["tiers"]
    assert [f.stat().st_mtime_ns for f in sorted((tmp_path / "out/ends").iterdir())] == stamps
    monkeypatch.setattr("lbw_rl.training_runs.evaluation.tiers.TIERS", (TIER,))
    arguments = ["evaluate", *map(str, policies), "--out", str(tmp_path / "out"), "--ablate", "--resume", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["tiers"] == json.loads(json.dumps(found["tiers"]))
    page = (tmp_path / "out/report.html").read_text()
    assert "LBW-Guard-style" in page
    assert "in 0 of 1 tiers" in page or "in 1 of 1 tiers" in page


def test_beside_a_device_a_run_has_readings_of_its_own_that_come_again_with_its_seed() -> None:
    class Listener(Controller):
        def reset(self, context: Context) -> None:
            self.heard: list[Telemetry] = []

        def act(self, telemetry: Telemetry) -> Action:
            self.heard.append(telemetry)
            return Action(lr_scale=0.5)

    def heard(seed: int) -> NDArray[np.float64]:
        arm = BesideADevice(Listener())
        arm.reset(Context(seed=seed))
        assert [arm.act(Telemetry(step=float(k), loss=2.0)).lr_scale for k in range(50)] == [0.5] * 50
        heard = arm.controller.heard
        assert [t.step for t in heard] == list(range(50))
        assert {t.loss for t in heard} == {2.0}
        return np.array([[t.gpu_utilization, t.gpu_memory, t.gpu_power] for t in heard])

    runs = [heard(seed) for seed in range(20)]
    assert np.array_equal(runs[3], heard(3), equal_nan=True)
    measured = ~np.isnan(np.array(runs))
    assert 0.1 < measured.mean() < 0.9  # sensors that a run lacks, and readings that go missing
    assert len(np.unique(np.array(runs)[measured])) == measured.sum()


def test_a_policy_is_judged_once(tmp_path: Path, policy_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"policies: .* each once"):
        evaluate([policy_folder, policy_folder / ".." / policy_folder.name], [TIER], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_groups_of_signals_are_features() -> None:
    named = [name for names in session.SIGNAL_GROUPS.values() for name in names]
    assert len(named) == len(set(named))
    device = {"gpu_utilization", "gpu_memory", "gpu_power"}  # there is none in a tier
    assert set(FEATURES) - set(named) == {"lr_scale", "momentum_scale", "nonfinite", *device}
    assert set(session.REMEMBERED) < set(named)


def test_a_shipped_policy_s_card_tells_how_it_was_judged(tmp_path: Path, policy_folder: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(policy_folder, source)
    (source / "CARD.md").write_text("# Card\n\n**Limits.** Some.\n")
    (source / "learning_curve.jsonl").write_text("")
    digest = json.loads((source / "policy.json").read_text())["weights_sha256"]
    judged = {"iqm": 0.0, "iqm_interval": [-0.1, 0.1], "lr_sensitivity": 0.01, "diverged": 0.0}
    against = {"LBW-Guard-style": {"iqm": math.log(0.9), "iqm_interval": [math.log(0.8), math.log(0.95)]}}
    found = {
        "tiers": {},
        "policies": {"x": {"small": {**judged, "against": against}}},
        "provenance": {"policies": {"x": digest}, "tiers": {"small": {"held_out": "nothing"}}},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    card = (ship(source, tmp_path / "shipped", tmp_path) / "CARD.md").read_text()
    assert (
        "| small | nothing | 1.000 [0.905, 1.105] | 0.900 [0.800, 0.950] | 0.010 | 0.0% |\n\n**Limits.** Some." in card
    )
    found["provenance"]["policies"]["x"] = "0" * 64
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"did not judge this policy \(weights sha256"):
        ship(source, tmp_path / "again", tmp_path)


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="policies: none given"):
        evaluate([], TIERS, tmp_path / "out")
    with pytest.raises(ValueError, match="policy"):
        evaluate([tmp_path / "absent"], TIERS, tmp_path / "out")
    with pytest.raises(ValueError, match=r"evaluation: cannot read .*; accepted: what lbw-rl evaluate wrote"):
        read_evaluation(tmp_path)
