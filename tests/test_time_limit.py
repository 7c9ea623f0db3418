"""A controller that hangs costs the run one wait; disks, probes and answers that fail cost it nothing."""

import threading
import time

import pytest
import torch

from lbw_rl import Action, Authority, Controller, Governor
from lbw_rl.time_limit import TimeLimit


def test_an_answer_and_an_exception_come_through():
    limit = TimeLimit(5.0)
    assert limit(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        limit(divmod, 1, 0)
    assert limit(abs, -3) == 3
    limit.close()


def test_a_late_answer_is_never_taken_for_the_next_one():
    limit, release = TimeLimit(0.05), threading.Event()

    def slow():
        release.wait(10)
        return "late"

    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        limit(slow)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="still busy"):
        limit(abs, -1)
    assert time.monotonic() - began < 5  # refused at once, not waited for again
    release.set()
    for _ in range(500):
        try:
            assert limit(abs, -1) == 1
            break
        except TimeoutError:
            time.sleep(0.01)
    else:
        pytest.fail("never came back")
    limit.close()


class Hangs(Controller):
    name = "hangs"
    time_limit = 0.05

    def __init__(self):
        self.release = threading.Event()

    def reset(self, context):
        pass

    def act(self, telemetry):
        self.release.wait(30)
        return Action(lr_scale=0.5)


def test_a_controller_that_hangs_is_suspended_and_the_run_is_the_ungoverned_one(make_mlp, caplog):
    def run(controller):
        model = make_mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        governor = Governor(optimizer, controller, authority=Authority(suspend_after=3)) if controller else None
        for step in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], governor

    hanging = Hangs()
    weights, governor = run(hanging)
    hanging.release.set()
    plain, _ = run(None)
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    assert governor.summary()["suspended"]
    assert governor.summary()["faults"] == {"controller": 3}
    assert sum("TimeoutError" in r.message for r in caplog.records) == 1  # warned once


def test_a_full_disk_costs_lines_and_no_more(make_mlp, caplog):
    """/dev/full takes every write and answers that no space is left."""
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = Governor(optimizer, "constant", ledger="/dev/full")
    for step in range(3):
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    governor.flush()
    governor.close()
    summary = governor.summary()
    assert summary["decisions"] == 3
    assert set(summary["faults"]) == {"ledger"}
    assert sum("No space left" in r.message for r in caplog.records) == 1
