"""The governor around real optimizers: idle it changes no bit, it sees what happens, it keeps account, it lets go."""

import json
import math

import numpy as np
import pytest
import torch
from governed_runs import STEPS, WIDE, Scripted, backward, bits, executed_rates, same_bits, train_lm, train_mlp

from lbw_rl import Action, Authority, Directive, Governor, Telemetry, load_controller
from lbw_rl.action import NEUTRAL
from lbw_rl.ledger import read_ledger

# ---- idle: the benign certificate


def test_constant_and_shadow_leave_every_bit_of_fifty_steps(make_optimizer, make_lm, tokens):
    def run(**governance):
        model = make_lm()
        optimizer = make_optimizer(model.parameters())
        governor = Governor(optimizer, model=model, total_steps=STEPS, **governance) if governance else None
        train_lm(model, optimizer, tokens)
        if governor is not None:
            summary = governor.summary()
            assert summary["decisions"] == STEPS
            assert not summary["faults"]
        return bits(model, optimizer), governor

    ungoverned, _ = run()
    constant, governor = run(controller="constant")
    assert governor.summary()["interventions"] == 0
    assert same_bits(constant, ungoverned)
    shadow, governor = run(controller="random", mode="shadow", authority=WIDE)
    assert governor.summary()["interventions"] == STEPS
    assert same_bits(shadow, ungoverned)


def test_off_attaches_nothing(make_mlp, tmp_path):
    model, plain = make_mlp(), make_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    governor = Governor(optimizer, "random", mode="off", model=model, ledger=tmp_path / "ledger.jsonl", authority=WIDE)
    train_mlp(model, optimizer, governor)
    train_mlp(plain, torch.optim.AdamW(plain.parameters()))
    assert same_bits(bits(model), bits(plain))
    assert governor.summary()["decisions"] == 0
    assert not (tmp_path / "ledger.jsonl").exists()
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_governing_works_on_every_optimizer(make_optimizer, make_lm, tokens):
    model = make_lm()
    optimizer = make_optimizer(model.parameters())
    governor = Governor(optimizer, "random", model=model, authority=WIDE, seed=1)
    rates = executed_rates(optimizer)
    base = float(optimizer.param_groups[0]["lr"])
    scales = []
    train_lm(model, optimizer, tokens, steps=12, after_step=lambda _: scales.append(governor.executed.lr_scale))
    assert rates == pytest.approx([base * s for s in scales])
    assert len(set(rates)) == 12
    assert float(optimizer.param_groups[0]["lr"]) == base
    assert not governor.summary()["faults"]


# ---- what is observed


def test_micro_batches_are_averaged_and_the_caller_s_word_wins(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = Scripted()
    governor = Governor(optimizer, controller, model=model)
    for step in range(2):
        for micro in range(3):
            batch = tokens(micro)
            (model(input_ids=batch, labels=batch).loss / 3).backward()
            governor.observe(float(micro + 1), tokens=5)
        governor.observe(grad_norm=torch.tensor(42.0 + step))
        optimizer.step()
        optimizer.zero_grad()
    seen = controller.seen
    assert [t.loss for t in seen] == [2.0, 2.0]
    assert [t.grad_norm for t in seen] == [42.0, 43.0]
    assert [t.step for t in seen] == [0.0, 1.0]


def test_tokens_that_the_caller_counts_are_not_counted_again(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controllers = {}
    for counted in (None, 16):
        controllers[counted] = Scripted()
        with Governor(optimizer, controllers[counted], model=model) as governor:
            for step in range(3):
                batch = tokens(step)
                model(input_ids=batch, labels=batch).loss.backward()
                governor.observe(tokens=counted)
                optimizer.step()
    for controller in controllers.values():
        # The window's clock starts before the first decision's end; tokens a step = rate × seconds a step.
        assert [t.tokens_per_second * t.step_seconds for t in controller.seen[1:]] == pytest.approx([16, 16])


def test_the_loss_is_read_from_the_model_s_output_and_evaluation_is_not_counted(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = Scripted()
    Governor(optimizer, controller, model=model)
    losses = []
    for step in range(3):
        with torch.no_grad():
            model(input_ids=tokens(100), labels=tokens(100))
        model.eval()
        model(input_ids=tokens(101), labels=tokens(101))
        model.train()
        batch = tokens(step)
        loss = model(input_ids=batch, labels=batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [t.loss for t in controller.seen] == losses
    assert [t.tokens_per_second * t.step_seconds for t in controller.seen[1:]] == pytest.approx([16, 16])


def test_telemetry_says_what_was_executed_and_what_is_scheduled(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    controller = Scripted(Action(lr_scale=0.5, momentum_scale=1.1), Action(lr_scale=0.25), NEUTRAL)
    governor = Governor(optimizer, controller, total_steps=4, authority=WIDE)
    train_mlp(model, optimizer, governor, steps=3)
    seen = controller.seen
    assert [t.lr_scale for t in seen] == [1.0, 0.5, 0.25]
    assert [t.momentum_scale for t in seen] == [1.0, 1.1, 1.0]
    assert [t.learning_rate for t in seen] == [0.02] * 3
    assert [t.progress for t in seen] == [0.0, 0.25, 0.5]
    assert math.isnan(seen[0].update_ratio)
    assert seen[1].update_ratio > seen[2].update_ratio > 0
    assert math.isnan(seen[1].gpu_utilization) or 0 <= seen[1].gpu_utilization <= 1


def test_a_poisoned_step_is_flagged_and_skipped_by_the_guard(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    governor = Governor(optimizer, "lbw-guard", total_steps=10)
    train_mlp(model, optimizer, governor, steps=3)
    before = bits(model, optimizer)
    governor.observe(backward(model, 3))
    model[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert governor.last_telemetry.nonfinite == 1.0
    assert same_bits(bits(model, optimizer), before)
    assert model[0].weight.grad is not None
    assert governor.summary()["skips"] == 1
    train_mlp(model, optimizer, governor, steps=3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_closure_style_optimizers_run(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    governor = Governor(optimizer, Scripted(repeat=Action(lr_scale=0.5, momentum_scale=1.1)))
    for step in range(3):
        optimizer.step(lambda: backward(model, step))  # noqa: B023
    assert governor.summary()["decisions"] == 3
    assert not governor.summary()["faults"]


# ---- windows


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_decision_every_k_steps_holds_in_between(every, make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    script = [Action(lr_scale=1 / (2 + i)) for i in range(10)]
    controller = Scripted(*script)
    governor = Governor(optimizer, controller, decide_every=every, authority=WIDE)
    rates = executed_rates(optimizer)
    train_mlp(model, optimizer, governor, steps=10)
    assert rates == pytest.approx([script[step // every].lr_scale for step in range(10)])
    assert [t.step for t in controller.seen] == list(range(0, 10, every))
    assert governor.summary()["decisions"] == -(-10 // every)


def test_a_skip_holds_for_one_step_and_its_scale_for_the_window(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    action = Action(lr_scale=0.5, directive=Directive.SKIP)
    governor = Governor(optimizer, Scripted(action), decide_every=3)
    before = bits(model)
    train_mlp(model, optimizer, governor, steps=1)
    assert same_bits(bits(model), before)
    rates = executed_rates(optimizer)
    train_mlp(model, optimizer, governor, steps=2, start=1)
    assert not same_bits(bits(model), before)
    assert rates == [0.5, 0.5]


def test_a_frozen_policy_brings_its_own_interval(make_mlp, policy_folder):
    controller = load_controller(policy_folder)
    controller.decide_every = 4
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    governor = Governor(optimizer, controller, decide_every=1)
    train_mlp(model, optimizer, governor, steps=8)
    assert governor.summary()["decisions"] == 2


# ---- ledger, summary, arguments


def test_the_ledger_holds_every_decision_and_can_be_decided_again(make_mlp, tmp_path):
    path = tmp_path / "run" / "ledger.jsonl"
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with Governor(optimizer, "lbw-guard", ledger=path, total_steps=20, authority=WIDE, seed=4) as governor:
        train_mlp(model, optimizer, governor, steps=20)
    header, *records = read_ledger(path)
    assert header["controller"] == "lbw-guard"
    assert header["mode"] == "govern"
    assert header["context"]["seed"] == 4
    assert Authority(**header["context"]["authority"]) == WIDE
    assert [r["step"] for r in records] == list(range(20))
    again = load_controller("lbw-guard")
    again.reset(governor.context)
    for record in records:
        action = again.act(Telemetry.from_dict(record["telemetry"]))
        assert action.lr_scale == record["proposed"]["lr_scale"]
        assert action.regime == record["regime"]
        executed, reasons = record["executed"]["lr_scale"], record["reasons"]
        assert (executed == action.lr_scale) or reasons


def test_shadow_mode_records_what_would_have_been_executed(make_mlp, tmp_path):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    script = [Action(lr_scale=0.5), Action(directive=Directive.SKIP)]
    with Governor(optimizer, Scripted(*script), mode="shadow", ledger=tmp_path / "ledger.jsonl") as governor:
        train_mlp(model, optimizer, governor, steps=2)
    _, first, second = read_ledger(tmp_path / "ledger.jsonl")
    assert first["would_execute"]["lr_scale"] == 0.5
    assert second["would_execute"]["directive"] == "skip"
    for record in (first, second):
        assert record["executed"] == {"lr_scale": 1.0, "momentum_scale": 1.0, "directive": "proceed"}
        assert "shadow mode" in record["reasons"]
    assert governor.summary()["skips"] == 1


def test_summary_has_its_keys_and_counts(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    script = [NEUTRAL, Action(lr_scale=0.5, regime="holding-back"), Action(directive=Directive.SKIP, regime="burst")]
    governor = Governor(optimizer, Scripted(*script), authority=WIDE)
    train_mlp(model, optimizer, governor, steps=4)
    summary = governor.summary()
    assert summary.pop("overhead_seconds") > 0
    assert summary == {
        "decisions": 4,
        "interventions": 2,
        "skips": 1,
        "rollbacks": 0,
        "hand_overs": 0,
        "suspended": False,
        "faults": {},
        "regimes": {"steady": 2, "holding-back": 1, "burst": 1},
        "mode": "govern",
        "controller": {},
    }
    json.dumps(governor.summary())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "advise"}, "mode: 'advise' is unknown; accepted: off, shadow, skip, lr, govern"),
        ({"controller": "lqr"}, "accepted: constant, pid, entropic, lbw-guard, ppo"),
        ({"total_steps": 0}, "total_steps: 0 is not accepted; accepted: a whole number, at least 1"),
        ({"total_steps": 2.5}, "total_steps: 2.5 is not accepted"),
        ({"decide_every": 0}, "decide_every: 0 is not accepted"),
        ({"seed": "one"}, "seed: 'one' is not accepted; accepted: a whole number, at least 0"),
        ({"authority": {"max_skip": 3}}, "max_skip"),
    ],
)
def test_a_bad_argument_is_refused_and_leaves_the_optimizer_alone(make_mlp, options, reason):
    optimizer = torch.optim.SGD(make_mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=reason):
        Governor(optimizer, **({"controller": "constant"} | options))
    assert not optimizer._optimizer_step_pre_hooks


def test_numbers_of_numpy_and_torch_and_a_mapping_of_rights_are_taken(make_mlp, tmp_path):
    optimizer = torch.optim.SGD(make_mlp().parameters(), lr=0.1)
    options = {
        "total_steps": np.int64(300),
        "seed": torch.tensor(3),
        "decide_every": 2.0,
        "authority": {"max_skips": 3},
    }
    with Governor(optimizer, "constant", ledger=tmp_path / "ledger.jsonl", **options) as governor:
        assert (governor.context.total_steps, governor.context.seed, governor.context.decide_every) == (300, 3, 2)
        assert governor.authority == Authority(max_skips=3)


def test_the_state_of_another_controller_is_refused_whole(make_mlp):
    optimizer = torch.optim.SGD(make_mlp().parameters(), lr=0.1)
    with Governor(optimizer, "constant") as governor:
        state = {**governor.state_dict(), "step": 7}
    with Governor(optimizer, "lbw-guard") as other:
        with pytest.raises(ValueError, match="state: is of the controller 'constant'; accepted: of 'lbw-guard'"):
            other.load_state_dict(state)
        assert other.step == 0


def test_a_model_that_is_heard_can_be_pickled_whole(make_lm, tokens, tmp_path):
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Governor(optimizer, "constant", model=model):
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(
        again(input_ids=tokens(0), labels=tokens(0)).loss, model(input_ids=tokens(0), labels=tokens(0)).loss
    )


# ---- attaching and letting go


def test_close_restores_and_detaches(make_lm, tokens):
    model = make_lm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = Governor(optimizer, Scripted(repeat=Action(lr_scale=0.5)), model=model)
    rates = executed_rates(optimizer)
    train_lm(model, optimizer, tokens, steps=2)
    governor.close()
    governor.close()
    train_lm(model, optimizer, tokens, steps=2, after_step=lambda _: governor.observe(1.0))
    assert rates == [0.05, 0.05, 0.1, 0.1]
    assert governor.summary()["decisions"] == 2
    assert not model._forward_hooks
    assert governor._measurement is None  # a loop that goes on observing fills no memory


def test_closing_in_the_middle_of_a_failed_step_restores(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = Governor(optimizer, Scripted(repeat=Action(lr_scale=0.5)))
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_mlp(model, optimizer, governor, steps=1)
    governor.close()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_two_governors_in_sequence_and_never_two_at_once(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rates = executed_rates(optimizer)
    with Governor(optimizer, Scripted(repeat=Action(lr_scale=0.5))) as first:
        train_mlp(model, optimizer, first, steps=1)
        with pytest.raises(ValueError, match="another governor"):
            Governor(optimizer, "constant")
        with Governor(optimizer, "constant", mode="shadow"):  # a second opinion is welcome
            pass
    with Governor(optimizer, Scripted(repeat=Action(lr_scale=0.25))) as second:
        train_mlp(model, optimizer, second, steps=1)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert len(rates) == 2
    assert first.summary()["decisions"] == second.summary()["decisions"] == 1
