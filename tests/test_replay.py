"""Recorded telemetry through another controller."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lbw_rl import Action, Authority, Context, Controller, Directive, Governor, Telemetry, load_controller
from lbw_rl.envs.recipe import load_recipe, override
from lbw_rl.replay import replay

RULES = ["constant", "pid", "entropic", "lbw-guard", "random", "open-loop"]


class Scripted(Controller):
    """Answers from a list, and remembers what it was told."""

    name = "scripted"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.seen: list[Telemetry] = []
        self.context: Context | None = None

    def reset(self, context: Context) -> None:
        self.context = context

    def act(self, telemetry: Telemetry) -> Action:
        self.seen.append(telemetry)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def ledger(tmp_path):
    """Writes a ledger of decisions at the given executed scales."""

    def write(*scales: float, directives: dict[int, str] | None = None, **authority: Any) -> Path:
        context = {
            "total_steps": 40,
            "decide_every": 2,
            "authority": Authority(**authority).model_dump(mode="json"),
            "seed": 5,
        }
        records = [{"type": "header", "schema": 1, "controller": "pid", "mode": "govern", "context": context}]
        for i, scale in enumerate(scales):
            executed = {"lr_scale": scale, "momentum_scale": 1.0, "directive": (directives or {}).get(i, "proceed")}
            telemetry = {"step": 2.0 * i, "loss": 5.0 - i, "grad_norm": None}
            records.append({"type": "decision", "step": 2 * i, "telemetry": telemetry, "executed": executed})
        path = tmp_path / "ledger.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return path

    return write


def test_what_the_controller_is_told(ledger):
    controller = Scripted(*[Action()] * 3)
    replay(ledger(1.0, 1.0, 1.0, lr_scale=(0.5, 4.0)), controller)
    assert controller.context == Context(
        total_steps=40, decide_every=2, authority=Authority(lr_scale=(0.5, 4.0)), seed=5
    )
    assert [(t.step, t.loss) for t in controller.seen] == [(0.0, 5.0), (2.0, 4.0), (4.0, 3.0)]
    assert all(t.grad_norm != t.grad_norm for t in controller.seen)  # null is "not measured"


def test_differences_are_counted_past_five_percent(ledger):
    answers = [Action(), Action(lr_scale=1.04), Action(directive=Directive.SKIP)]
    answers += [Action(lr_scale=0.93), Action(lr_scale=0.5), Action()]
    result = replay(ledger(1.0, 1.0, 1.0, 1.0, 0.5, 1.0, directives={5: "skip"}, slew_up=10.0), Scripted(*answers))
    assert result.recorded_controller == "pid"
    assert (result.decisions, result.differing, result.faults) == (6, 3, 0)
    differs = [abs(s["replayed_lr_scale"] / s["recorded_lr_scale"] - 1) > 0.05 for s in result.steps]
    assert differs == [False, False, False, True, False, False]
    assert [s["recorded_lr_scale"] for s in result.steps] == [1.0, 1.0, 1.0, 1.0, 0.5, 1.0]
    assert [s["step"] for s in result.steps] == [0, 2, 4, 6, 8, 10]
    assert [s["replayed_directive"] for s in result.steps] == ["proceed", "proceed", "skip"] + ["proceed"] * 3


def test_the_recorded_authority_holds(ledger):
    result = replay(
        ledger(1.0, 1.0, 1.0, lr_scale=(0.5, 4.0), slew_up=1.5),
        Scripted(*[Action(lr_scale=s) for s in (100, 100, 1e-9)]),
    )
    assert [s["replayed_lr_scale"] for s in result.steps] == [1.5, 2.25, 0.5]
    assert all(s["reasons"] for s in result.steps)


def test_a_broken_controller_is_a_finding(ledger):
    answers = [RuntimeError("no"), Action(lr_scale=float("nan")), "nonsense", Action(lr_scale=0.5)]
    result = replay(ledger(1.0, 1.0, 1.0, 1.0, suspend_after=5), Scripted(*answers))
    assert result.faults == 3
    assert result.regimes["fault"] == 3
    assert [s["replayed_lr_scale"] for s in result.steps] == [1.0, 1.0, 1.0, 0.5]
    assert "RuntimeError: no" in result.steps[0]["reasons"][0]


def test_a_line_torn_by_a_kill_is_passed_over(ledger):
    path = ledger(1.0, 1.0)
    path.write_text(path.read_text() + '{"type":"decision","st')
    assert replay(path, Scripted(Action(), Action())).decisions == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"telemetry": {"mood": 1.0}}, "unknown signal 'mood'"),
        ({"telemetry": {"loss": "high"}}, "ValueError"),
        ({"telemetry": None}, "TypeError"),
        ({"executed": {"lr_scale": 0.0, "directive": "proceed"}}, "lr_scale must be > 0"),
        ({"executed": {"lr_scale": 1.0}}, "'directive'"),
        ({"step": None}, "TypeError"),
    ],
)
def test_a_damaged_decision_is_refused_and_not_blamed_on_the_controller(change, reason, ledger):
    path = ledger(1.0, 1.0)
    header, first, second = path.read_text().splitlines()
    path.write_text("\n".join([header, first, json.dumps(json.loads(second) | change)]) + "\n")
    with pytest.raises(ValueError) as caught:
        replay(path, Scripted(Action(), Action()))
    assert str(caught.value).startswith("ledger: the decision at step ")
    assert reason in str(caught.value)


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """Controller name → ledger of a real run under it, at thirty times the learning rate."""
    pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
    from lbw_rl.training_runs.run import run

    folder = tmp_path_factory.mktemp("recorded")
    for name in RULES:
        settings = [f"controller.name={name}", "train.steps=25", "train.lr_multiplier=30"]
        run(override(load_recipe("mini-qwen2"), [*tiny, *settings]), folder / name)
    return {name: folder / name / "ledger.jsonl" for name in RULES}


@pytest.mark.parametrize("name", RULES)
def test_a_controller_on_its_own_telemetry_decides_as_it_did(name, recorded):
    result = replay(recorded[name], load_controller(name))
    assert (result.decisions, result.faults) == (25, 0)
    assert result.differing == 0
    assert [s["replayed_lr_scale"] for s in result.steps] == [s["recorded_lr_scale"] for s in result.steps]
    decisions = [json.loads(line) for line in recorded[name].read_text().splitlines()[1:]]
    assert [s["regime"] for s in result.steps] == [d["regime"] for d in decisions]
    assert [s["reasons"] for s in result.steps] == [d["reasons"] for d in decisions]


def test_another_controller_would_have_acted(recorded):
    result = replay(recorded["constant"], load_controller("lbw-guard"))
    assert result.recorded_controller == "constant"
    assert result.differing > 15  # thirty times too fast, and nobody held it
    assert min(s["replayed_lr_scale"] for s in result.steps) < 0.5
    assert sum(result.regimes.values()) == 25


def test_where_it_would_have_acted_is_told_in_stretches(tmp_path):
    """A constant run through a burst of NaN: lbw-guard names the steps that it would have skipped, and no others."""
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Governor(optimizer, "constant", total_steps=30, ledger=tmp_path / "ledger.jsonl") as governor:
        for step in range(30):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean()
            loss.backward()
            governor.observe(math.nan if step in (12, 13, 20) else loss)
            optimizer.step()
    skips = [
        p for p in replay(tmp_path / "ledger.jsonl", load_controller("lbw-guard")).passages if p["directive"] == "skip"
    ]
    assert [(p["first"], p["last"], p["regime"]) for p in skips] == [(12, 13, "non-finite"), (20, 20, "non-finite")]
    assert all(p["recorded"] == 1.0 for p in skips)
