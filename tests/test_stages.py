"""Staged authority: what each mode permits, and changing it while a run goes on."""

import json
import os
import signal
import time

import pytest
import torch

from lbw_rl import Action, Authority, Controller, Directive, Governor
from lbw_rl.stages import MODES, Switch

WIDE = Authority(lr_scale=(1e-3, 100.0), slew_up=1000.0, max_rollbacks=3, rollback_cooldown=0, snapshot_every=1)


def replace_rights(authority, **changes):
    return Authority(**{**authority.model_dump(), **changes})


class Scripted(Controller):
    """Acts by a script, repeating its last action."""

    name = "scripted"

    def __init__(self, *actions):
        self.actions = list(actions)

    def reset(self, context):
        self.asked = 0

    def act(self, telemetry):
        self.asked += 1
        return self.actions[min(self.asked, len(self.actions)) - 1]


def train(model, optimizer, steps, before=lambda step: None):
    """Plain steps; returns the learning rate inside each step and whether the step changed any weight."""
    rates, changed = [], []
    handle = optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for step in range(steps):
        before(step)
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        old = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        changed.append(any(not torch.equal(a, b) for a, b in zip(old, model.parameters(), strict=True)))
    handle.remove()
    return rates, changed


HALVE, SKIP, BACK = (
    Action(lr_scale=0.5),
    Action(lr_scale=0.5, directive=Directive.SKIP),
    Action(lr_scale=0.5, directive=Directive.ROLLBACK),
)


@pytest.mark.parametrize(
    ("mode", "rates", "changed", "rollbacks"),
    [
        ("shadow", [1.0, 1.0, 1.0], [True, True, True], 0),
        ("skip", [1.0, 1.0, 1.0], [True, False, True], 0),
        ("lr", [0.5, 1.0, 0.5], [True, False, True], 0),
        ("govern", [0.5, 1.0, 1.0], [True, False, True], 1),
    ],
)
def test_a_mode_permits_what_it_says_and_no_more(mode, rates, changed, rollbacks, make_mlp, tmp_path):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    governor = Governor(optimizer, Scripted(HALVE, SKIP, BACK), authority=WIDE, mode=mode, ledger=tmp_path / "l")
    assert train(model, optimizer, 3) == (rates, changed)
    executed = [json.loads(line)["executed"]["directive"] for line in (tmp_path / "l").read_text().splitlines()[1:]]
    assert executed.count("rollback") == rollbacks
    assert governor.mode == mode


def test_what_a_mode_denies_is_named_in_the_ledger(make_mlp, tmp_path):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Governor(optimizer, Scripted(HALVE, BACK), authority=WIDE, mode="skip", ledger=tmp_path / "l")
    train(model, optimizer, 2)
    reasons = [json.loads(line)["reasons"] for line in (tmp_path / "l").read_text().splitlines()[1:]]
    assert reasons[0] == ["scales held to 1: mode is skip"]
    assert "rollback denied: mode is skip" in reasons[1]


def test_promotion_step_by_step_while_the_run_goes_on(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    governor = Governor(optimizer, Scripted(HALVE, SKIP, HALVE), authority=WIDE, mode="shadow")
    stages = {2: "skip", 4: "lr", 6: "shadow", 8: "govern"}
    rates, changed = train(model, optimizer, 10, lambda step: step in stages and governor.set_mode(stages[step]))
    assert rates == [1.0] * 4 + [0.5] * 2 + [1.0] * 2 + [0.5] * 2
    assert all(changed)
    assert governor.mode == "govern"


def test_promotion_climbs_from_what_is_executed_not_from_what_shadow_mode_dreamt_of(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    authority = Authority(lr_scale=(1e-3, 100.0), slew_up=2.0)
    governor = Governor(optimizer, Scripted(Action(lr_scale=100.0)), authority=authority, mode="shadow")
    rates, _ = train(model, optimizer, 12, lambda step: step == 10 and governor.set_mode("lr"))
    assert rates[10:] == pytest.approx([2e-3, 4e-3])


@pytest.mark.parametrize("mode", ["lr", "govern"])
def test_a_run_resumed_in_another_mode_climbs_from_what_was_executed(mode, make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    options = {"authority": Authority(lr_scale=(1e-3, 100.0), slew_up=2.0)}
    before = Governor(optimizer, Scripted(Action(lr_scale=100.0)), mode="shadow", **options)
    train(model, optimizer, 10)
    state = before.state_dict()
    before.close()
    after = Governor(optimizer, Scripted(Action(lr_scale=100.0)), mode=mode, **options)
    after.load_state_dict(state)
    rates, _ = train(model, optimizer, 2)
    assert rates == pytest.approx([2e-3, 4e-3])


def test_no_budget_is_won_or_lost_by_resuming_in_shadow_mode(make_mlp):
    """Of one rollback allowed: done, it is spent whatever shadow mode ruled since; only ruled in shadow mode, it is left."""
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rights = replace_rights(WIDE, max_rollbacks=1)

    def resumed(state, mode, steps):
        governor = Governor(optimizer, Scripted(HALVE, BACK), authority=rights, mode=mode)
        if state is not None:
            governor.load_state_dict(state)
        train(model, optimizer, steps)
        told = governor.state_dict()
        governor.close()
        return told, governor.last_ruling

    spent, _ = resumed(None, "govern", 2)
    through_shadow, _ = resumed(spent, "shadow", 3)
    assert "rollback denied: 1 done, 1 allowed" in resumed(through_shadow, "govern", 2)[1].reasons
    dreamt, _ = resumed(None, "shadow", 2)
    _, ruling = resumed(dreamt, "govern", 2)
    assert ruling.action.directive is Directive.ROLLBACK


def test_a_control_file_changes_the_mode(make_mlp, tmp_path, caplog):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    control = tmp_path / "control"
    governor = Governor(optimizer, Scripted(HALVE), authority=WIDE, control=control)

    def write(step):
        if step == 2:
            control.write_text("shadow\n")
            _wait_for(lambda: governor._switch._wish is not None)
        if step == 4:
            control.write_text("half-speed")
            _wait_for(lambda: "half-speed" in caplog.text)

    rates, _ = train(model, optimizer, 6, write)
    assert rates == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert f"mode govern -> shadow ({control}); lr_scale was 0.5" in caplog.text
    assert "'half-speed' is no mode; accepted: off, shadow, skip, lr, govern" in caplog.text
    governor.close()


def test_a_control_file_that_is_there_at_the_start_counts(make_mlp, tmp_path):
    (tmp_path / "control").write_text("shadow")
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    governor = Governor(optimizer, Scripted(HALVE), control=tmp_path / "control")
    assert train(model, optimizer, 2)[0] == [1.0, 1.0]
    governor.close()


def test_the_kill_signal_lets_go_at_the_next_step_and_says_so(make_mlp, tmp_path, caplog):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    heard = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: heard.append("before"))
    try:
        governor = Governor(
            optimizer, Scripted(HALVE), authority=WIDE, kill_signal=signal.SIGUSR1, ledger=tmp_path / "l"
        )
        rates, _ = train(model, optimizer, 6, lambda step: step == 3 and os.kill(os.getpid(), signal.SIGUSR1))
        assert rates == [0.5] * 3 + [1.0] * 3
        assert governor.mode == "off"
        assert "governance at step 3: mode govern -> off (SIGUSR1); lr_scale was 0.5" in caplog.text
        assert heard == ["before"]  # who listened before still hears it
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == ["before"] * 2  # and has the signal back
    finally:
        signal.signal(signal.SIGUSR1, previous)
    last = json.loads((tmp_path / "l").read_text().splitlines()[-1])
    assert last == {"type": "mode", "step": 3, "from": "govern", "to": "off", "by": "SIGUSR1"}
    governor.close()
    assert not optimizer._optimizer_step_pre_hooks


def test_off_while_a_scale_is_in_force_leaves_no_trace_in_the_groups(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    governor = Governor(optimizer, Scripted(Action(lr_scale=0.5, momentum_scale=0.6)), authority=WIDE)
    train(model, optimizer, 4, lambda step: step == 2 and governor.set_mode("off"))
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert governor.summary()["decisions"] == 2


def test_an_unknown_mode_is_refused_with_the_known_ones(make_mlp):
    governor = Governor(torch.optim.SGD(make_mlp().parameters(), lr=0.1), "constant")
    with pytest.raises(ValueError, match=f"mode: 'on' is unknown; accepted: {', '.join(MODES)}"):
        governor.set_mode("on")


def test_a_second_governor_cannot_be_promoted_beside_the_first(make_mlp, caplog):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Governor(optimizer, Scripted(HALVE), authority=WIDE)
    second = Governor(optimizer, Scripted(HALVE), authority=WIDE, mode="shadow")
    second.set_mode("lr")
    assert train(model, optimizer, 2)[0] == [0.5, 0.5]
    assert second.mode == "shadow"
    assert "another governor governs" in caplog.text


def test_a_second_governor_that_is_switched_off_leaves_the_first_ones_claim(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Governor(optimizer, Scripted(HALVE), authority=WIDE)
    second = Governor(optimizer, Scripted(HALVE), authority=WIDE, mode="shadow")
    second.set_mode("off")
    assert train(model, optimizer, 2)[0] == [0.5, 0.5]
    assert second.mode == "off"
    with pytest.raises(ValueError, match="another governor governs it"):
        Governor(optimizer, "constant")


def test_a_switch_never_raises_for_what_a_file_holds(tmp_path):
    for content in (b"", b"\xff\xfe", b"{}", b"govern shadow"):
        (tmp_path / "control").write_bytes(content)
        switch = Switch(tmp_path / "control")
        assert switch.take() is None
        switch.close()
    (tmp_path / "control").unlink()
    (tmp_path / "control").mkdir()
    Switch(tmp_path / "control").close()


def _wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()
