"""A recorded path of scales, replayed without looking at anything."""

import json
import math

import pytest

from lbw_rl import Action, Authority, Context, Controller, Telemetry, load_controller
from lbw_rl.controllers.open_loop import OpenLoop
from lbw_rl.envs.recipe import load_recipe, override
from lbw_rl.training_runs.run import run


@pytest.fixture
def ledger(tmp_path):
    """Writes a ledger: (step, scale, directive) of each decision."""

    def write(name: str, *decisions: tuple[int, float, str], total: int | None, every: int = 1) -> str:
        context = {"total_steps": total, "decide_every": every}
        records = [{"type": "header", "schema": 1, "controller": "pid", "context": context}]
        for step, scale, directive in decisions:
            executed = {"lr_scale": scale, "momentum_scale": 1.0, "directive": directive}
            records.append({"type": "decision", "step": step, "telemetry": {}, "executed": executed})
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return str(path)

    return write


def path(controller: Controller, n: int, **context) -> list[float]:
    controller.reset(Context(**context))
    return [controller.act(Telemetry(loss=math.nan, update_ratio=9.0)).lr_scale for _ in range(n)]


def test_without_a_recording_the_run_is_left_alone():
    assert OpenLoop().act(Telemetry()) == Action()


def test_a_run_of_the_same_length_gets_the_recorded_scales(ledger):
    scales = [1.0, 2.0, 0.5, 4.0]
    recorded = ledger("a", *((i, s, "proceed") for i, s in enumerate(scales)), total=4)
    assert path(OpenLoop(ledgers=[recorded]), 4, total_steps=4) == pytest.approx(scales)
    assert path(OpenLoop(ledgers=recorded), 4, total_steps=4) == pytest.approx(scales)
    assert path(OpenLoop(scales=scales), 4, total_steps=4) == pytest.approx(scales)
    assert path(load_controller("open-loop", scales=scales), 6) == pytest.approx([*scales, 4.0, 4.0])  # its end is held


def test_several_runs_give_the_geometric_mean(ledger):
    a = ledger("a", (0, 1.0, "proceed"), (1, 4.0, "proceed"), total=2)
    b = ledger("b", (0, 4.0, "proceed"), (1, 0.25, "proceed"), total=2)
    controller = OpenLoop(ledgers=[a, b])
    assert path(controller, 2, total_steps=2) == pytest.approx([2.0, 1.0])
    assert controller.summary() == {"recordings": 2, "mean_lr_scale": pytest.approx(math.sqrt(2))}
    assert path(OpenLoop(ledgers=[a, b], constant=True), 2, total_steps=2) == pytest.approx([math.sqrt(2)] * 2)


def test_another_length_or_interval_is_read_off_at_the_same_progress(ledger):
    short = ledger("a", (0, 1.0, "proceed"), (2, 16.0, "proceed"), total=4, every=2)
    expected = [1.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0, 16.0]  # linear in the logarithm
    assert path(OpenLoop(ledgers=[short]), 8, total_steps=8) == pytest.approx(expected)
    assert path(OpenLoop(ledgers=[short]), 4, total_steps=8, decide_every=2) == pytest.approx(expected[::2])
    assert path(OpenLoop(ledgers=[short]), 4) == pytest.approx([1.0, 4.0, 16.0, 16.0])  # unknown horizon: its own


def test_a_withheld_update_executed_no_scale(ledger):
    recorded = ledger("a", (0, 1.0, "proceed"), (1, 1e-3, "skip"), (2, 4.0, "proceed"), total=3)
    assert path(OpenLoop(ledgers=[recorded]), 3, total_steps=3) == pytest.approx([1.0, 2.0, 4.0])


def test_an_unusable_ledger_is_refused_in_one_line(ledger, tmp_path):
    skipped = ledger("skipped", (0, 1.0, "skip"), total=1)
    nothing = ledger("nothing", total=1)
    zero = ledger("zero", (0, 0.0, "proceed"), total=1)
    twice = ledger("twice", (0, 1.0, "proceed"), (0, 1.0, "proceed"), total=1)
    (tmp_path / "text").write_text("hello\nworld\n")
    for which, reason in {
        skipped: "holds no executed update; accepted: a governed run's ledger.jsonl",
        nothing: "holds no executed update",
        zero: "is damaged (ValueError: executed.lr_scale must be > 0 and finite)",
        twice: "it holds several runs",
        str(tmp_path / "text"): "is not JSON",
        str(tmp_path / "absent"): "is not a file; accepted: ",
    }.items():
        with pytest.raises(ValueError) as refused:
            OpenLoop(ledgers=[which])
        assert str(refused.value).startswith("open-loop.ledgers: ")
        assert which in str(refused.value)
        assert reason in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_replayed_governor_executes_its_own_path(tiny, tmp_path):
    """From a real run's ledger into a recipe's arm: same seed, same scales, so the same run."""
    pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
    settings = [*tiny, "train.measure_device=false", "train.steps=12"]
    governed = override(load_recipe("mini-qwen2"), [*settings, "controller.name=pid"])
    original = run(governed, tmp_path / "governed")
    assert original["interventions"] > 5
    option = f"controller.options.ledgers=['{tmp_path / 'governed' / 'ledger.jsonl'}']"
    replayed = run(override(governed, ["controller.name=open-loop", option]), tmp_path / "replayed")
    assert replayed["final_loss"] == pytest.approx(original["final_loss"], rel=1e-5)
    executed = [
        [
            json.loads(line)["executed"]["lr_scale"]
            for line in (tmp_path / name / "ledger.jsonl").open()
            if '"decision"' in line
        ]
        for name in ("governed", "replayed")
    ]
    assert executed[1] == pytest.approx(executed[0], rel=1e-12)


def test_the_authority_holds_for_a_path_too(tiny, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
    recipe = override(
        load_recipe("mini-qwen2"), [*tiny, "controller.name=open-loop", "controller.options.scales=[5.0, 1e-3]"]
    )
    narrow = recipe.model_copy(update={"authority": Authority(lr_scale=(0.5, 2.0), slew_up=100.0)})
    run(narrow, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "ledger.jsonl").open()]
    scales = [r["executed"]["lr_scale"] for r in records if r["type"] == "decision"]
    assert scales[0] == 2.0
    assert scales[-1] == 0.5
