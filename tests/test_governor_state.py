"""A governed run goes back, and goes on from a checkpoint, bit for bit."""

import io

import pytest
import torch
from governed_runs import WIDE, Scripted, backward, bits, executed_rates, same_bits, train_mlp

from lbw_rl import Action, Authority, Directive, Governor, load_controller
from lbw_rl.action import NEUTRAL
from lbw_rl.ledger import read_ledger

# ---- rollback


def test_rollback_restores_weights_and_optimizer_bit_for_bit(make_optimizer, make_mlp):
    model = make_mlp()
    optimizer = make_optimizer(model.parameters())
    authority = Authority(max_rollbacks=1, snapshot_every=4)
    script = [NEUTRAL] * 6 + [Action(directive=Directive.ROLLBACK)] * 2
    governor = Governor(optimizer, Scripted(*script), authority=authority)
    history = []
    for step in range(8):
        history.append(bits(model, optimizer))
        train_mlp(model, optimizer, governor, steps=1, start=step)
        if step == 6:
            assert same_bits(bits(model, optimizer), history[4])  # the last snapshot: steps 0 and 4
            assert [g["lr"] for g in optimizer.param_groups] == [optimizer.defaults["lr"]]
    assert not same_bits(bits(model, optimizer), history[4])  # the second one was denied: the step went on
    assert governor.summary()["rollbacks"] == 1
    assert not governor.summary()["faults"]


def last_reasons(path):
    return list(read_ledger(path))[-1]["reasons"]


def test_rollback_is_denied_with_a_reason_where_it_is_not_permitted(make_mlp, tmp_path):
    rollback = Action(directive=Directive.ROLLBACK)
    cases = {
        "0 done, 0 allowed": (Authority(), {}),
        "no good state has been kept": (Authority(max_rollbacks=1), {"snapshot_bytes": 10}),
    }
    for i, (reason, (authority, options)) in enumerate(cases.items()):
        model, path = make_mlp(), tmp_path / f"{i}.jsonl"
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Governor(optimizer, Scripted(NEUTRAL, rollback), authority=authority, ledger=path, **options) as governor:
            train_mlp(model, optimizer, governor, steps=1)
            before = bits(model)
            train_mlp(model, optimizer, governor, steps=1, start=1)
            assert not same_bits(bits(model), before)  # the step went on
        assert reason in last_reasons(path)[0]
        assert governor.summary()["rollbacks"] == 0


def test_only_healthy_states_are_kept(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    script = [NEUTRAL, Action(regime="loss-spike"), Action(regime="diverged"), Action(directive=Directive.ROLLBACK)]
    authority = Authority(max_rollbacks=1, snapshot_every=1)
    governor = Governor(optimizer, Scripted(*script), authority=authority)
    before = bits(model)
    train_mlp(model, optimizer, governor, steps=4)
    assert same_bits(bits(model), before)  # the state of step 0, not those of steps 1 and 2


# ---- resume


CONTROLLERS = ["constant", "pid", "entropic", "lbw-guard", "random", "open-loop", "ppo"]


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize(("every", "cut"), [(1, 13), (4, 14)], ids=["each-step", "in-mid-window"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name, every, cut, make_mlp, policy_folder):
    def start():
        model = make_mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        controller = load_controller(policy_folder if name == "ppo" else name)
        if controller.decide_every is not None:
            controller.decide_every = every
        authority = Authority(lr_scale=(1e-3, 100.0), max_rollbacks=2, snapshot_every=5)
        governor = Governor(optimizer, controller, total_steps=30, decide_every=every, authority=authority, seed=2)
        return model, optimizer, governor

    def advance(model, optimizer, governor, steps):
        for step in steps:
            governor.observe(backward(model, step))
            optimizer.step()

    whole = start()
    advance(*whole, range(30))

    model, optimizer, governor = start()
    advance(model, optimizer, governor, range(cut))
    file = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "governor": governor.state_dict()}
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer, governor = start()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    governor.load_state_dict(saved["governor"])
    advance(model, optimizer, governor, range(cut, 30))

    assert same_bits(bits(model, optimizer), bits(*whole[:2]))
    summary, expected = governor.summary(), whole[2].summary()
    for key in set(summary) - {"overhead_seconds"}:
        assert summary[key] == expected[key]


def test_a_window_cut_by_a_checkpoint_loses_none_of_its_losses(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = Scripted(), Scripted()
    with Governor(optimizer, first, decide_every=4) as governor:
        for step in range(2):
            backward(model, step)
            governor.observe(step, grad_norm=7.0, tokens=10)
            optimizer.step()
        governor.observe(2.0)  # of the step at hand
        saved = governor.state_dict()
    governor = Governor(optimizer, second, decide_every=4)
    governor.load_state_dict(saved)
    for step in range(2, 5):
        backward(model, step)
        governor.observe(2.0 * step, tokens=10)
        optimizer.step()
    (seen,) = second.seen
    assert seen.step == 4
    assert seen.loss == pytest.approx((1 + 2 + 4 + 6 + 8) / 5)  # the loss of step 0 was the first decision's
    assert seen.tokens_per_second * seen.step_seconds == pytest.approx(40 / 4)
    assert seen.grad_norm != 7.0  # that was of a step in between


def test_a_state_from_a_wider_authority_is_held_to_the_present_one(make_mlp):
    def start(**options):
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        governor = Governor(optimizer, Scripted(repeat=Action(lr_scale=50.0)), decide_every=4, **options)
        return model, optimizer, governor, executed_rates(optimizer)

    model, optimizer, governor, rates = start(authority=WIDE)
    train_mlp(model, optimizer, governor, steps=2)
    assert rates == [50.0, 50.0]
    for options, expected in (({"authority": Authority()}, 1.25), ({"authority": WIDE, "mode": "shadow"}, 1.0)):
        model, optimizer, resumed, rates = start(**options)
        resumed.load_state_dict(governor.state_dict())
        train_mlp(model, optimizer, resumed, steps=2, start=2)  # the rest of the window
        assert rates == [expected, expected]


# ---- its ledger


def governed_into(ledger, make_mlp, steps, state=None):
    """A plain loop; returns its governor's last state."""
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Governor(optimizer, "constant", ledger=ledger, total_steps=30, measure_device=False) as governor:
        if state is not None:
            governor.load_state_dict(state)
        train_mlp(model, optimizer, governor, steps=steps, start=governor.step)
        return governor.state_dict()


def test_a_loop_resumed_from_an_older_checkpoint_writes_no_step_twice(make_mlp, tmp_path):
    at_ten = governed_into(tmp_path / "ledger.jsonl", make_mlp, 10)
    governed_into(tmp_path / "ledger.jsonl", make_mlp, 5, at_ten)  # killed at 15
    governed_into(tmp_path / "ledger.jsonl", make_mlp, 20, at_ten)
    header, *decisions = read_ledger(tmp_path / "ledger.jsonl")
    assert header["type"] == "header"
    assert [record["step"] for record in decisions] == list(range(30))


def test_a_script_that_runs_twice_leaves_two_runs_in_its_ledger(make_mlp, tmp_path):
    for _ in range(2):
        governed_into(tmp_path / "ledger.jsonl", make_mlp, 3)
    assert [record.get("step") for record in read_ledger(tmp_path / "ledger.jsonl")] == [None, 0, 1, 2] * 2
