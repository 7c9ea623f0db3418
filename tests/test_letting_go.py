"""A governor that has to let go, or was told to: at once, for good, and with the ledger to tell of it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from hard_case_runs import FREE, Acts, backward, same, weights

from lbw_rl import Action, Directive, Governor, load_controller
from lbw_rl.replay import replay


def test_a_kill_signal_that_comes_twice_does_not_end_the_run(tmp_path):
    """Whoever kills governance may ask again: the default action of SIGUSR1 would end the process."""
    script = textwrap.dedent(
        """
        import os, signal, torch
        from lbw_rl import Governor
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Governor(optimizer, "lbw-guard", kill_signal=signal.SIGUSR1)
        for _ in range(4):
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
            os.kill(os.getpid(), signal.SIGUSR1)
        print("lived")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "lived"), done.stderr


def test_nothing_takes_a_kill_back(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    governor = Governor(optimizer, Acts(), kill_signal=signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR2)
    governor.set_mode("lr")
    backward(model)
    optimizer.step()
    assert governor.mode == "off"


def test_a_kill_does_not_wait_for_the_next_decision(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    governor = Governor(optimizer, Acts(lambda n: Action(lr_scale=0.5)), authority=FREE, decide_every=10)
    rates = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for step in range(4):
        if step == 2:
            governor.set_mode("off")
        backward(model, step)
        optimizer.step()
    assert rates == [0.5, 0.5, 1.0, 1.0]


def test_a_constructor_that_fails_leaves_nothing_attached(make_mlp):
    """Only the main thread may install a signal handler."""
    original = torch.nn.utils.clip_grad_norm_
    model, errors = make_mlp(), []

    def build():
        try:
            Governor(torch.optim.SGD(model.parameters(), lr=1.0), "constant", model=model, kill_signal=signal.SIGUSR2)
        except ValueError as e:
            errors.append(e)

    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert not model._forward_hooks
    assert torch.nn.utils.clip_grad_norm_ is original


def test_what_shadow_mode_would_have_done_costs_no_budget(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    back = Acts(lambda n: Action(directive=Directive.ROLLBACK if n in (1, 6) else Directive.PROCEED))
    authority = FREE.model_copy(update={"snapshot_every": 1})
    governor = Governor(optimizer, back, authority=authority, mode="shadow")
    for step in range(8):
        if step == 4:
            governor.set_mode("govern")
        backward(model, step)
        before = weights(model)
        optimizer.step()
        if step == 6:
            assert governor.executed.directive is Directive.ROLLBACK
            assert not same(before, weights(model))


def test_closing_from_within_a_controller_leaves_no_scale_behind(make_mlp):
    class Quits(Acts):
        def rolled_back(self):
            governor.close()

    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    quits = Quits(lambda n: Action(lr_scale=0.5, directive=Directive.ROLLBACK if n == 2 else Directive.PROCEED))
    governor = Governor(optimizer, quits, authority=FREE)
    for step in range(5):
        backward(model, step)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_governor_that_was_told_to_let_go_stays_off_after_a_resume(make_mlp, tmp_path, caplog):
    def build():
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        halve = Acts(lambda n: Action(lr_scale=0.5))
        return model, optimizer, Governor(optimizer, halve, authority=FREE, ledger=tmp_path / "l.jsonl")

    model, optimizer, governor = build()
    for step in range(4):
        if step == 2:
            governor.set_mode("off")
        backward(model, step)
        optimizer.step()
    state = governor.state_dict()
    model, optimizer, governor = build()
    governor.load_state_dict(state)
    rates = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    backward(model)
    optimizer.step()
    assert rates == [1.0]
    assert governor.mode == "off"
    assert "it stays off" in caplog.text


def test_a_resume_in_another_mode_is_in_the_ledger(make_mlp, tmp_path):
    saved = None
    for mode in ("shadow", "lr"):
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with Governor(optimizer, Acts(), authority=FREE, mode=mode, ledger=tmp_path / "l.jsonl") as governor:
            if saved is not None:
                governor.load_state_dict(saved)
            backward(model)
            optimizer.step()
            saved = governor.state_dict()
    kinds = [json.loads(line)["type"] for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert kinds == ["header", "decision", "mode", "decision"]


def test_the_ledgers_of_two_runs_in_one_file_are_told_apart(make_mlp, tmp_path):
    for controller in ("constant", "pid", "pid"):
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with Governor(optimizer, controller, ledger=tmp_path / "l.jsonl"):
            backward(model)
            optimizer.step()
    records = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [r.get("controller") for r in records if r["type"] == "header"] == ["constant", "pid", "pid"]
    with pytest.raises(ValueError, match="holds several runs; accepted: one run a ledger"):
        replay(tmp_path / "l.jsonl", load_controller("pid"))
