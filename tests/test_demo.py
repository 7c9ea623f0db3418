"""The main job, end to end, on the smallest budget that still goes through every step."""

import json
from contextlib import contextmanager

import pytest

from lbw_rl.training_runs.demo import BUDGETS, Budget, budget_named, demo
from lbw_rl.training_runs.results import read_results

TINY = Budget(
    decisions=2048,
    seeds=1,
    multipliers=(1.0, 30.0),
    settings=("train.steps=12", "train.eval_every=6", "data.eval_sequences=8"),
    proxies=4,
)


class _Meter:
    def __init__(self):
        self.shown = []

    def update(self, done, total, note=""):
        self.shown.append((done, total, note))


def test_an_unknown_budget_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"budget: 'huge' is unknown; accepted: quick, full"):
        budget_named("huge")
    assert budget_named("quick") is BUDGETS["quick"]


@pytest.mark.slow
def test_the_whole_line_and_its_resumption(tmp_path):
    """Learn, freeze, deploy beside every rule and control, report; again with --resume: nothing is run twice."""
    meters = {}

    @contextmanager
    def meter(label):
        meters[label] = _Meter()
        yield meters[label]

    results, report = demo(tmp_path / "demo", TINY, meter)
    arms = {row.arm for row in results.rows}
    assert {"AdamW", "AdamW + clip 1.0", "PPO policy", "untrained policy", "random actions"} <= arms
    assert len(results.rows) == len(arms) * 2
    assert all(m.shown[-1][0] == m.shown[-1][1] for m in meters.values())
    text = report.read_text(encoding="utf-8")
    assert "PPO policy" in text
    assert "1885.24" in text  # the source's claims stand beside ours
    header = json.loads((tmp_path / "demo/policy/policy.json").read_text())
    assert header["provenance"]["trained_on_decisions"] >= 2048
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo/runs").rglob("summary.json")}
    again, _ = demo(tmp_path / "demo", TINY, meter, resume=True)
    assert again.rows == results.rows
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert read_results(tmp_path / "demo").rows == results.rows
