"""No step is handed over unpermitted, nor before the rate is known; the reason is named."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import OPTIMIZERS
from governed_runs import same_bits
from hand_over_runs import (
    KNOWN,
    PERMITTED,
    Asks,
    bits,
    decisions,
    make_model,
    train,
)

from lbw_rl import CONTROLLERS, Action, Authority, Directive, Governor, load_controller
from lbw_rl.enforcer import Enforcer
from lbw_rl.sgd_rate import HALF_LIFE


@pytest.mark.parametrize("value", [1, "yes", None, np.bool_(True)])
def test_what_is_no_bool_is_a_fault(value):
    ruling = Enforcer(PERMITTED).rule(Action(hand_over=value))
    assert ruling.action.regime == "fault"
    assert "hand_over is" in ruling.reasons[0]
    assert "not a bool" in ruling.reasons[0]


@pytest.mark.parametrize(
    ("authority", "mode", "directive", "why", "reason"),
    [
        (Authority(), "govern", "proceed", None, "the authority does not permit it"),
        (PERMITTED, "skip", "proceed", None, "mode is skip"),
        (PERMITTED, "govern", "skip", None, "no update is executed"),
        (PERMITTED, "govern", "proceed", "it rains", "it rains"),
    ],
)
def test_a_denied_hand_over_is_dropped_with_a_reason(authority, mode, directive, why, reason):
    proposed = Action(hand_over=True, directive=Directive(directive))
    ruling = Enforcer(authority, mode).rule(proposed, no_hand_over=why)
    assert not ruling.action.hand_over
    assert ruling.reasons == (f"hand-over denied: {reason}",)


@pytest.mark.parametrize("mode", ["lr", "govern", "shadow"])
def test_a_permitted_one_passes(mode):
    ruling = Enforcer(PERMITTED, mode).rule(Action(hand_over=True))
    assert ruling.action.hand_over
    assert ruling.reasons == ()


@pytest.mark.parametrize("name", CONTROLLERS)
def test_no_controller_hands_over_without_permission(name):
    """A wrapper around each of them that asks at every decision: the run is the one of the controller that does not."""
    runs = {}
    for asks in (False, True):
        controller = load_controller(name)
        if asks:
            controller.act = lambda telemetry, act=controller.act: replace(act(telemetry), hand_over=True)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        governor = Governor(optimizer, controller, measure_device=False)
        train(model, optimizer, KNOWN)
        assert governor.summary()["hand_overs"] == 0
        runs[asks] = bits(model, optimizer)
    assert same_bits(runs[False], runs[True])


@pytest.mark.parametrize("mode", ["shadow", "skip", "off"])
def test_modes_without_the_scales_leave_every_bit_alone(mode, tmp_path):
    plain = make_model()
    ungoverned = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    train(plain, ungoverned, KNOWN + 5)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with Governor(optimizer, Asks(), authority=PERMITTED, mode=mode, ledger=tmp_path / "ledger.jsonl"):
        train(model, optimizer, KNOWN + 5)
    assert same_bits(bits(model, optimizer), bits(plain, ungoverned))
    if mode == "shadow":
        last = decisions(tmp_path / "ledger.jsonl")[-1]
        assert last["would_execute"]["hand_over"] is True
        assert "hand_over" not in last["executed"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_hands_over_or_is_denied_and_stays_as_it_was(name, tmp_path):
    runs = []
    for governed in (False, True):
        model = make_model()
        optimizer = OPTIMIZERS[name](model.parameters())
        governor = Governor(optimizer, Asks(), authority=PERMITTED, ledger=tmp_path / "l.jsonl") if governed else None
        train(model, optimizer, KNOWN)
        runs.append(bits(model, optimizer))
    summary, last = governor.summary(), governor.last_ruling
    governor.close()
    assert summary["faults"] == {}
    if isinstance(optimizer, torch.optim.Adam):
        assert summary["hand_overs"] > 0
        assert not same_bits(*runs)
    else:
        assert summary["hand_overs"] == 0
        assert last.reasons == (f"hand-over denied: {type(optimizer).__name__} is not torch's Adam or AdamW",)
        assert same_bits(*runs)


def test_before_the_rate_is_known_the_run_is_adams():
    plain, model = make_model(), make_model()
    ungoverned = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    governor = Governor(optimizer, Asks(), authority=PERMITTED)
    for m, o in ((plain, ungoverned), (model, optimizer)):
        train(m, o, int(HALF_LIFE))
    assert same_bits(bits(model, optimizer), bits(plain, ungoverned))
    assert "Adam steps measured" in governor.last_ruling.reasons[0]
