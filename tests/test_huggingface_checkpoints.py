"""The callback through Trainer's checkpoints: a resumed run decides as the uninterrupted one."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
pytest.importorskip("accelerate", reason="needs the extra lbw-rl[hf]")
pytest.importorskip("peft", reason="needs the extra lbw-rl[hf]")

from trainer_runs import STEPS, WIDE, Scripted, decisions, make_trainer, run_trainer, same, signal  # noqa: E402

from lbw_rl import Action, Authority, Directive, load_controller  # noqa: E402
from lbw_rl.controllers.entropic import EntroPIC  # noqa: E402
from lbw_rl.controllers.lbw_guard import LBWGuard  # noqa: E402
from lbw_rl.controllers.pid import PID  # noqa: E402
from lbw_rl.integrations.huggingface import GovernorCallback  # noqa: E402

SAVING = {"save_strategy": "steps", "save_steps": 4}


def checkpoint(folder: Path, step: int = 4) -> str:
    return str(folder / "trainer" / f"checkpoint-{step}")


def state_of(folder: Path, step: int = 4) -> Any:
    return json.loads((Path(checkpoint(folder, step)) / "trainer_state.json").read_text())


def resumes_exactly(folder: Path, make: Any, **changes: Any) -> Any:
    """Trains 10 steps at a stretch, then steps 4 to 9 again from a checkpoint, and compares every bit; the callback."""
    settings = {**SAVING, "max_steps": 10, **changes}
    whole = run_trainer(folder, make(folder / "l.jsonl"), **settings)
    ledger = (folder / "l.jsonl").read_text()
    callback = make(folder / "l.jsonl")  # the same ledger: as after a crash at step 10
    resumed = run_trainer(folder, callback, resume=checkpoint(folder), **settings)
    assert (folder / "l.jsonl").read_text() == ledger
    assert same(whole, resumed)
    assert same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert len({json.dumps(d["executed"]) for d in decisions(folder / "l.jsonl")[2:]}) > 1  # it did decide something
    return resumed


@pytest.mark.parametrize(
    ("controller", "options", "changes"),
    [
        ("lbw-guard", {}, {}),
        ("lbw-guard", {"decide_every": 3}, {"gradient_accumulation_steps": 2}),  # in the middle of a window
        ("lbw-guard", {"late": True}, {"optim": "adamw_torch"}),  # with a measurement on its way
        ("lbw-guard", {}, {"kind": "lora", "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
        ("lbw-guard", {}, {"restore_callback_states_from_checkpoint": True}),
        ("pid", {}, {"optim": "sgd"}),
        (EntroPIC(warmup=2), {}, {}),
        ("random", {}, {}),
        ("policy", {}, {}),
    ],
    ids=["guard", "mid-window", "late", "lora", "rebuilt", "pid", "entropic", "random", "policy"],
)
def test_a_resumed_run_decides_and_trains_as_the_uninterrupted_one(
    controller, options, changes, tmp_path, policy_folder
):
    def make(ledger: Path) -> GovernorCallback:
        chosen = policy_folder if controller == "policy" else controller
        return GovernorCallback(chosen, authority=WIDE, ledger=ledger, measure_device=False, **options)

    resumes_exactly(tmp_path, make, **changes)


def test_counters_go_on_and_the_checkpoint_is_strict_json_of_moderate_size(tmp_path):
    callback = GovernorCallback(authority=Authority(max_rollbacks=1))
    run_trainer(tmp_path, callback, **SAVING)
    ours = state_of(tmp_path)["stateful_callbacks"]["GovernorCallback"]
    assert len(json.dumps(ours, allow_nan=False)) < 200_000
    assert ours["governor"]["snapshot"] is None
    resumed = GovernorCallback(authority=Authority(max_rollbacks=1))
    run_trainer(tmp_path, resumed, resume=checkpoint(tmp_path))
    summary, before = resumed.governor.summary(), callback.governor.summary()
    assert summary["decisions"] == before["decisions"] == STEPS
    assert summary["regimes"] == before["regimes"]


def test_after_a_resume_the_first_healthy_decision_keeps_a_new_good_state(tmp_path):
    def make(ledger: Path) -> GovernorCallback:
        controller = Scripted({8: Action(directive=Directive.ROLLBACK)})
        return GovernorCallback(controller, authority=Authority(max_rollbacks=1, snapshot_every=3), ledger=ledger)

    run_trainer(tmp_path, make(tmp_path / "whole.jsonl"), **SAVING, max_steps=10)
    run_trainer(tmp_path, make(tmp_path / "resumed.jsonl"), max_steps=10, resume=checkpoint(tmp_path))
    assert decisions(tmp_path / "whole.jsonl")[8]["restored_step"] == 6  # kept at 0, 3, 6
    assert decisions(tmp_path / "resumed.jsonl")[4]["restored_step"] == 7  # kept at 4, 7


def test_rebuilt_from_the_checkpoint_it_has_the_options_and_the_mode_of_then(tmp_path):
    class Operator(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                callback.governor.set_mode("shadow")

    callback = GovernorCallback(
        "pid", authority=WIDE, decide_every=2, seed=5, ledger=tmp_path / "l.jsonl", control=tmp_path / "none"
    )
    run_trainer(tmp_path, callback, Operator(), **SAVING)
    given = GovernorCallback("constant")
    flag = {"restore_callback_states_from_checkpoint": True}
    trainer = run_trainer(tmp_path, given, resume=checkpoint(tmp_path), **flag)
    assert given.governor is None
    rebuilt = trainer.callback_handler.callbacks[0]
    assert isinstance(rebuilt, GovernorCallback)
    governor = rebuilt.governor
    assert (governor.controller.name, governor.mode, governor.authority) == ("pid", "shadow", WIDE)
    assert (governor.context.decide_every, governor.context.seed) == (2, 5)
    assert [d["step"] for d in decisions(tmp_path / "l.jsonl")] == [0, 2, 4]


def test_controllers_that_json_cannot_build_again_are_refused_where_they_would_have_to_be(tmp_path):
    flag = {"restore_callback_states_from_checkpoint": True}
    for controller in (PID(ki=0.5), Scripted({})):
        with pytest.raises(ValueError, match=r"cannot build this (PID|Scripted); accepted: a name or a folder"):
            make_trainer(tmp_path, GovernorCallback(controller), **flag)
    make_trainer(tmp_path, GovernorCallback(LBWGuard()), **flag)  # equal to what its name makes
    resumes_exactly(
        tmp_path, lambda ledger: GovernorCallback(PID(ki=0.5), authority=WIDE, ledger=ledger, measure_device=False)
    )


# --- what does not fit -----------------------------------------------------------------------------------


def test_an_ungoverned_checkpoint_is_gone_on_from_governed(tmp_path):
    often = {"save_strategy": "steps", "save_steps": 2}
    run_trainer(tmp_path, **often)
    callback = GovernorCallback("pid", ledger=tmp_path / "l.jsonl")
    trainer = run_trainer(tmp_path, callback, resume=checkpoint(tmp_path), **often)
    assert trainer.state.global_step == STEPS
    made = decisions(tmp_path / "l.jsonl")
    assert [d["step"] for d in made] == [4, 5]
    assert signal(made, "progress") == pytest.approx([4 / STEPS, 5 / STEPS])
    assert state_of(tmp_path, STEPS)["stateful_callbacks"]["GovernorCallback"]["governor"]["step"] == STEPS


@pytest.mark.parametrize("reason", ["another controller", "incomplete", "damaged"])
def test_a_state_that_does_not_fit_starts_the_controller_anew(reason, tmp_path, caplog):
    run_trainer(tmp_path, GovernorCallback("lbw-guard", ledger=tmp_path / "l.jsonl"), **SAVING)
    if reason != "another controller":
        record = state_of(tmp_path)
        state = record["stateful_callbacks"]["GovernorCallback"]["governor"]
        if reason == "incomplete":
            del state["enforcer"]
        else:
            state["measurement"]["probe"]["gradient"]["__tensor__"]["shape"] = [3]
        (Path(checkpoint(tmp_path)) / "trainer_state.json").write_text(json.dumps(record))
    callback = GovernorCallback("pid" if reason == "another controller" else "lbw-guard", ledger=tmp_path / "l.jsonl")
    with caplog.at_level(logging.WARNING, "lbw_rl"):
        run_trainer(tmp_path, callback, resume=checkpoint(tmp_path))
    said = (
        "the checkpoint is lbw-guard's; pid starts anew" if reason == "another controller" else "could not be restored"
    )
    assert said in caplog.text
    assert callback.governor.summary()["decisions"] == 2
    assert [d["step"] for d in decisions(tmp_path / "l.jsonl")] == list(range(STEPS))


def test_a_state_that_is_no_json_costs_the_checkpoint_nothing_but_itself(tmp_path, caplog):
    class Odd(type(load_controller("constant"))):
        def state_dict(self) -> dict[str, Any]:
            return {"odd": object()}

    with caplog.at_level(logging.WARNING, "lbw_rl"):
        trainer = run_trainer(tmp_path, GovernorCallback(Odd()), **SAVING)
    assert "the checkpoint has no governor's state: TypeError: state: object is no JSON" in caplog.text
    assert trainer.state.global_step == STEPS
    assert state_of(tmp_path)["stateful_callbacks"]["GovernorCallback"]["governor"] is None


def test_a_ledger_that_cannot_be_cut_does_not_stop_the_run(tmp_path, caplog):
    run_trainer(tmp_path, GovernorCallback("pid", ledger=tmp_path / "l.jsonl"), **SAVING)
    (tmp_path / "l.jsonl.tmp").mkdir()  # in the way of the replacement
    with caplog.at_level(logging.WARNING, "lbw_rl"):
        trainer = run_trainer(
            tmp_path, GovernorCallback("pid", ledger=tmp_path / "l.jsonl"), resume=checkpoint(tmp_path)
        )
    assert "what comes after the checkpoint could not be dropped" in caplog.text
    assert trainer.state.global_step == STEPS


# --- several ranks ---------------------------------------------------------------------------------------


def main(folder: Path, resume: str | None) -> None:
    """One rank of `test_ranks_resume_together`."""
    torch.set_num_threads(1)
    callback = GovernorCallback(
        "lbw-guard", authority=WIDE, ledger=folder / "l.jsonl", measure_device=False, decide_every=1
    )
    trainer = make_trainer(folder, callback, **SAVING, max_steps=10)
    trainer.train(resume_from_checkpoint=resume)
    assert callback.governor.summary()["faults"] == {}
    torch.save(trainer.model.state_dict(), folder / f"weights.{trainer.args.process_index}.pt")


@pytest.mark.slow
def test_ranks_resume_together(tmp_path):
    """Two processes under DDP: rank 0's state serves both, and every later decision is the uninterrupted run's."""
    results = []
    for resume in ("", checkpoint(tmp_path)):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*launch, __file__, str(tmp_path), resume], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        ledgers = [(tmp_path / name).read_text() for name in ("l.jsonl", "l.rank1.jsonl")]
        results.append((ledgers, [torch.load(tmp_path / f"weights.{rank}.pt", weights_only=True) for rank in (0, 1)]))
    (before, whole), (after, resumed) = results
    assert after == before
    assert [d["digest"] for d in decisions(tmp_path / "l.jsonl")] == [
        d["digest"] for d in decisions(tmp_path / "l.rank1.jsonl")
    ]
    assert same(whole, resumed)
    assert same(whole[0], whole[1])
    shutil.rmtree(tmp_path / "trainer")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] or None)
