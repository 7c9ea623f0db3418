"""The report: built from whatever a comparison left behind, complete without a network, drawn in a browser."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lbw_rl.training_runs.report import build_report, render_table
from lbw_rl.training_runs.report_data import Curve, downsample, read_decisions, read_metrics, smooth
from lbw_rl.training_runs.report_figures import arm_styles, regime_styles
from lbw_rl.training_runs.results import Results, Row, summarise, write_results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "path", "circle"}


def make_run(folder: Path, steps: int = 60, governed: bool = True, torn: bool = False, evil: str = "") -> None:
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {
            "step": i,
            "loss": None if i == 7 else 7.0 - 2.0 * i / steps,
            "eval_loss": 6.0 if i % 20 == 0 else None,
            "lr": 3e-3,
            "seconds": 0.1 * i,
        }
        for i in range(steps)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "lo' * torn
    )
    if not governed:
        return
    ledger: list[dict[str, Any]] = [{"type": "header", "schema": 1, "controller": "x", "context": {}}]
    for i in range(steps):
        executed = {"lr_scale": 0.5 + i / steps, "momentum_scale": 1.0, "directive": "skip" if i == 9 else "proceed"}
        telemetry = {"loss": None, "gpu_utilization": 0.5 if i > 3 else None}
        regime = ("spike" + evil) if 20 <= i < 25 else "steady"
        decision = {"type": "decision", "step": i, "telemetry": telemetry, "proposed": executed, "executed": executed}
        ledger.append(
            {**decision, "regime": regime, "evidence": {"surprise" + evil: 1.5, "gone": None}, "reasons": ["cap"]}
        )
    ledger.insert(5, {"type": "event", "what": "resumed"})
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger) + '{"type": "dec' * torn)


def make_results(
    directory: Path,
    arms: dict[str, str],
    multipliers: list[float],
    seeds: int = 1,
    recipes: tuple[str, ...] = ("mini",),
) -> Results:
    rows = []
    for recipe in recipes:
        for a, (arm, controller) in enumerate(arms.items()):
            for multiplier in multipliers:
                for seed in range(seeds):
                    folder = f"runs/{recipe}-{a}-{multiplier:g}-{seed}"
                    make_run(directory / folder, governed=controller != "none", torn=seed == 0)
                    loss = (
                        4.4
                        + 0.3 * abs(math.log10(multiplier)) * (controller in ("none", "constant"))
                        + 0.01 * seed
                        - 0.02 * a
                    )
                    rows.append(
                        Row(
                            recipe=recipe,
                            optimizer="AdamW",
                            controller=controller,
                            arm=arm,
                            lr_multiplier=multiplier,
                            base_lr=3e-3,
                            seed=seed,
                            final_loss=loss,
                            final_ppl=math.exp(loss),
                            initial_loss=7.0,
                            diverged=False,
                            steps=60,
                            seconds=10.0,
                            overhead_seconds=0.1 * (controller != "none"),
                            skips=0,
                            rollbacks=0,
                            steps_to_target=40 + a,
                            folder=folder,
                        )
                    )
    provenance = {"command": "lbw-rl compare mini", "versions": {"torch": "2.13.0"}, "corpus_sha256": "0f" * 32}
    results = Results(rows=rows, summary={**summarise(rows, "AdamW"), "provenance": provenance})
    write_results(directory, results)
    return results


ARMS = {"AdamW": "none", "AdamW + clip 1.0": "constant", "entropic": "entropic", "lbw-guard": "lbw-guard", "ppo": "ppo"}


class Page(HTMLParser):
    """Collects a page's tags, and fails on one that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def built(directory: Path) -> tuple[Page, dict[str, Any]]:
    text = build_report(directory).read_text(encoding="utf-8")
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert figures is not None
    return Page(text), json.loads(figures[1], parse_constant=pytest.fail)


def test_a_full_comparison_becomes_one_self_contained_page(tmp_path: Path) -> None:
    make_results(tmp_path, ARMS, [0.1, 1.0, 10.0], seeds=3)
    page, figures = built(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 8e6
    fetched = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href") and v]
    assert fetched == []
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert len(figures) == 1 + 3 + 3 + 3
    ids = [attrs["id"] for tag, attrs in page.tags if attrs.get("class") == "plot"]
    assert sorted(ids) == sorted(figures)
    assert all(attrs.get("aria-label") for _, attrs in page.tags if attrs.get("role") in ("img", "region"))
    for words in ("corpus_sha256", "versions.torch", "1885.24", "our own design", "not tuned", "−18.7 %", "120 → 75"):
        assert words in page.text


def test_the_verdict_follows_the_numbers(tmp_path: Path) -> None:
    results = make_results(tmp_path, ARMS, [0.1, 1.0], seeds=3)
    better = [
        r.model_copy(update={"final_loss": r.final_loss + 0.001 * r.seed * (r.arm == "ppo")}) for r in results.rows
    ]
    write_results(tmp_path, Results(rows=better, summary={"reference_arm": "AdamW"}))
    assert "ppo beat 4 of 4 other arms" in built(tmp_path)[0].text
    worse = [r.model_copy(update={"final_loss": r.final_loss + (r.arm == "ppo")}) for r in better]
    write_results(tmp_path, Results(rows=worse, summary={"reference_arm": "AdamW"}))
    text = built(tmp_path)[0].text
    assert "ppo beat 0 of 4 other arms" in text
    assert re.search(r"did not beat AdamW \(×2\.\d+ \[.*?\], higher\)", text)


def test_an_arm_has_one_colour_in_every_figure(tmp_path: Path) -> None:
    make_results(tmp_path, ARMS, [1.0, 10.0], recipes=("mini", "wide"))
    _, figures = built(tmp_path)
    colours: dict[str, set[str]] = {}
    for figure in figures.values():
        for trace in figure["data"]:
            if "meta" in trace:
                colours.setdefault(trace["meta"], set()).add(trace["line"]["color"])
    assert set(colours) == set(ARMS)
    assert all(len(seen) == 1 for seen in colours.values())
    assert len(set.union(*colours.values())) == len(ARMS)


def test_styles_stay_apart_past_the_palette() -> None:
    arms = {f"arm {i}": i % 2 == 0 for i in range(16)}
    styles = arm_styles(arms, "arm 1", ["arm 6"])
    assert list(styles) == list(arms)
    assert len({(s.colour, s.dash) for s in styles.values()}) == 16
    assert len(set(regime_styles([f"regime {i}" for i in range(12)]).values())) == 12


def test_missing_files_are_left_out_and_named(tmp_path: Path) -> None:
    results = make_results(tmp_path, ARMS, [1.0, 10.0])
    for r in results.rows:
        if r.lr_multiplier == 10.0 and r.arm == "ppo":
            (tmp_path / r.folder / "ledger.jsonl").unlink()
            (tmp_path / r.folder / "metrics.jsonl").write_text("")
    page, figures = built(tmp_path)
    assert "No metrics for ppo at 10×" in page.text
    assert "No ledger for ppo at 10×" in page.text
    assert "No ledger for AdamW" not in page.text  # it has no governor, so it should have none
    assert [t["meta"] for t in figures["r0-scale1"]["data"] if t["mode"] == "lines"] == ["entropic", "lbw-guard"]


def test_rows_alone_make_a_report(tmp_path: Path) -> None:
    results = make_results(tmp_path, {"AdamW": "none"}, [1.0])
    shutil.rmtree(tmp_path / "runs")
    write_results(tmp_path, Results(rows=results.rows))
    page, figures = built(tmp_path)
    assert list(figures) == ["r0-lr"]
    assert "No governed run left a ledger" in page.text
    assert "No governed arm is in this comparison" in page.text


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    make_results(tmp_path, ARMS, [1.0])
    page, _ = built(tmp_path)
    assert "With one seed there is no interval" in page.text
    assert "ppo beat" not in page.text


def test_divergence_and_wild_numbers_are_drawn(tmp_path: Path) -> None:
    results = make_results(tmp_path, ARMS, [1.0, 10.0], seeds=2)
    rows = [
        Row(**(r.model_dump() | {"final_loss": math.nan}))
        if r.lr_multiplier > 1 and r.controller in ("none", "constant")
        else r
        for r in results.rows
    ]
    metrics = '{"step": 1, "loss": NaN, "eval_loss": Infinity}\n[]\n{"step": null}\n{"step": 2, "loss": 1e300}\n\x00\n'
    decisions: list[dict[str, Any]] = [
        {"step": 1, "executed": {"lr_scale": None}, "regime": None, "evidence": [], "reasons": "x"},
        {"step": 2, "executed": {"lr_scale": 0.0, "directive": "rollback"}, "evidence": {"a": "b"}},
    ]
    for r in rows:
        if r.arm == "ppo" and r.lr_multiplier == 10.0:
            (tmp_path / r.folder / "metrics.jsonl").write_text(metrics)
            ledger = "".join(json.dumps({"type": "decision", **d}) + "\n" for d in decisions)
            (tmp_path / r.folder / "ledger.jsonl").write_text(ledger)
    write_results(tmp_path, Results(rows=rows))
    page, figures = built(tmp_path)
    assert "2/2 diverged" in page.text
    reference = next(t for t in figures["r0-lr"]["data"] if t["meta"] == "AdamW")
    assert reference["marker"]["symbol"] == ["circle", "x"]


def test_strings_from_the_results_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>\"'"
    results = make_results(tmp_path, {"AdamW": "none", evil: "ppo"}, [1.0])
    for r in results.rows:
        shutil.rmtree(tmp_path / r.folder)
        make_run(tmp_path / r.folder, governed=r.arm != "AdamW", evil=evil)
    rows = [r.model_copy(update={"recipe": evil}) for r in results.rows]
    write_results(tmp_path, Results(rows=rows, summary={"provenance": {evil: [evil]}}))
    page, figures = built(tmp_path)
    assert "img" not in [tag for tag, _ in page.tags]
    assert "<img" not in json.dumps([t.get("customdata") for f in figures.values() for t in f["data"]])
    assert "<img" not in json.dumps([t.get("name") for f in figures.values() for t in f["data"]])


def test_a_large_comparison_stays_small(tmp_path: Path) -> None:
    results = make_results(tmp_path, {"AdamW": "none", **{f"ppo {i}": "ppo" for i in range(9)}}, [0.1, 1.0, 10.0])
    long = tmp_path / results.rows[-1].folder
    metrics, ledger = (long / "metrics.jsonl").read_text(), (long / "ledger.jsonl").read_text()
    records = [json.loads(line) for line in ledger.splitlines()[10:40]]
    flapping = [{**r, "step": 60 * k + i, "regime": f"r{i % 7}"} for k in range(60) for i, r in enumerate(records)]
    for r in results.rows:
        (tmp_path / r.folder / "metrics.jsonl").write_text(metrics)
        (tmp_path / r.folder / "ledger.jsonl").write_text("".join(json.dumps(f) + "\n" for f in flapping))
    assert build_report(tmp_path).stat().st_size < 8e6


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 1, "rows": []}'])
def test_a_folder_without_results_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    if text:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json") as caught:
        build_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_the_terminal_table_marks_the_best(tmp_path: Path) -> None:
    results = make_results(tmp_path, ARMS, [0.1, 1.0], seeds=2, recipes=("mini", "wide"))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_table(results))
    lines = [line for line in console.export_text().splitlines() if "ppo" in line]
    assert len(lines) == 2
    assert all(line.count("*") == 2 for line in lines)


# --- reading --------------------------------------------------------------------------------------------


def test_metrics_and_decisions_survive_a_torn_line(tmp_path: Path) -> None:
    make_run(tmp_path / "run", torn=True)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl", 400)
    decisions = read_decisions(tmp_path / "run" / "ledger.jsonl", 400, 200)
    assert metrics is not None
    assert decisions is not None
    assert len(metrics.train.steps) == 60
    assert np.isnan(metrics.train.values[7])
    assert metrics.held_out.steps.tolist() == [0, 20, 40]
    assert [(b.start, b.end, b.regime) for b in decisions.bands] == [
        (0, 20, "steady"),
        (20, 25, "spike"),
        (25, 60, "steady"),
    ]
    assert decisions.directives == [(9, "skip", 0.65)]
    assert decisions.gpu_utilization == 0.5
    assert "surprise = 1.5" in decisions.bands[1].detail
    assert read_metrics(tmp_path / "no.jsonl", 400) is None
    assert read_decisions(tmp_path / "no.jsonl", 400, 200) is None


def test_a_resumed_run_is_read_in_order_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": float(s)}) + "\n" for s in (0, 1, 3, 2)))
    metrics = read_metrics(path, 400)
    assert metrics is not None
    assert metrics.train.steps.tolist() == [0, 1, 2, 3]


def test_thinned_bands_keep_a_rare_regime_and_leave_no_gap(tmp_path: Path) -> None:
    regimes = ["a" if i % 2 else "b" for i in range(1000)]
    regimes[501] = "spike"
    path = tmp_path / "ledger.jsonl"
    lines = [{"type": "decision", "step": i, "executed": {"lr_scale": 1.0}, "regime": r} for i, r in enumerate(regimes)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    decisions = read_decisions(path, 400, 50)
    assert decisions is not None
    bands = decisions.bands
    assert len(bands) <= 50
    assert [b.start for b in bands[1:]] == [b.end for b in bands[:-1]]
    assert (bands[0].start, bands[-1].end) == (0, 1000)
    assert [b for b in bands if b.regime == "spike" and b.start <= 501 < b.end]


def test_downsampling_keeps_spikes_and_gaps() -> None:
    values = np.zeros(10_000)
    values[1234], values[4000:6000] = 9.0, np.nan
    thinned = downsample(Curve(np.arange(10_000.0), values), 400)
    assert len(thinned.steps) <= 400
    assert (np.diff(thinned.steps) > 0).all()
    assert np.nanmax(thinned.values) == 9.0
    assert thinned.steps[np.nanargmax(thinned.values)] == 1234
    assert np.isnan(thinned.values).any()


def test_smoothing_is_a_mean_that_no_gap_enters() -> None:
    values = np.ones(1000)
    values[500], values[100] = np.nan, 22.0
    smoothed = smooth(values)
    assert np.isnan(smoothed).sum() == 1
    assert smoothed[100] == pytest.approx(2.0)
    assert smoothed[505] == pytest.approx(1.0)
    assert smooth(values[:50]) is not None


# --- a real browser -------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the figures were not drawn")
def test_a_browser_draws_every_visible_figure(tmp_path: Path) -> None:
    make_results(tmp_path, ARMS, [1.0, 10.0], seeds=2)
    report = build_report(tmp_path)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --virtual-time-budget=5000 --window-size=1200,3000 --dump-dom"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(CHROMIUM), *flags.split(), profile, report.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    plots = re.findall(r'<div class="plot[^>]*id="(r0-[a-z]+\d*)"[^>]*>(.{0,200})', dom, re.DOTALL)
    drawn = {name for name, inside in plots if "plot-container" in inside}
    assert {name for name, _ in plots} - drawn == {"r0-reg0"}  # the tab that is not open
    assert dom.count('class="main-svg"') >= len(drawn)
    assert 'class="xtick"' in dom
