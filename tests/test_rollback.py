"""Rolling back: everything that training moves goes back bit for bit, the data goes on, the ledger names what was lost."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch

from lbw_rl import Action, Authority, Controller, Directive, Governor
from lbw_rl.controllers.lbw_guard import LBWGuard
from lbw_rl.snapshot import Snapshot

AUTHORITY = Authority(lr_scale=(1e-3, 100.0), slew_up=1000.0, max_rollbacks=2, snapshot_every=4, rollback_cooldown=0)
STEPS, BACK_AT, GOOD = 20, 11, 8


class Counting(Controller):
    """Scales by what it has counted, so that its state shows in the weights; asks for a rollback at one step."""

    name = "counting"

    def reset(self, context):
        self.count = 0
        self.told = []

    def act(self, telemetry):
        self.count += 1
        directive = Directive.ROLLBACK if telemetry.step == BACK_AT and not self.told else Directive.PROCEED
        return Action(lr_scale=1.0 + 0.01 * self.count, directive=directive)

    def rolled_back(self):
        self.told.append(self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Noisy(torch.nn.Module):
    """Dropout (torch's generator), batch statistics (buffers), and data noise from Python's and numpy's generators."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 4)
        )

    def loss(self, step):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        noise = random.random() + np.random.standard_normal()  # noqa: NPY002
        return (self.net(x) + noise).square().mean()


def everything():
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)  # noqa: NPY002
    model = Noisy()
    torch.manual_seed(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    return model, optimizer, scheduler, scaler


def step_once(model, optimizer, scheduler, scaler, step):
    optimizer.zero_grad()
    scaler.scale(model.loss(step)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()


def test_a_rollback_is_bitwise_the_state_that_was_and_the_data_is_not_rewound(tmp_path):
    """Against a hand-written loop that saves everything at step 8 and puts it back at step 11."""
    governed = everything()
    governor = Governor(
        governed[1],
        Counting(),
        model=governed[0],
        authority=AUTHORITY,
        stateful={"scheduler": governed[2], "scaler": governed[3]},
        ledger=tmp_path / "ledger.jsonl",
    )
    for step in range(STEPS):
        step_once(*governed, step)
    assert governor.summary()["rollbacks"] == 1
    assert governor.summary()["faults"] == {}

    model, optimizer, scheduler, scaler = everything()
    count, saved = 0, None
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(model.loss(step)).backward()
        scaler.unscale_(optimizer)
        count += 1
        if step == GOOD:
            saved = copy.deepcopy([x.state_dict() for x in (model, optimizer, scheduler, scaler)])
            generators = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
            counted = count
        if step == BACK_AT:
            # The loop's own scaler.step and scheduler.step of this step still follow.
            for x, state in zip((model, optimizer, scheduler, scaler), copy.deepcopy(saved), strict=True):
                x.load_state_dict(state)
            random.setstate(generators[0])
            np.random.set_state(generators[1])  # noqa: NPY002
            torch.set_rng_state(generators[2])
            count = counted
            optimizer.zero_grad()
        group = optimizer.param_groups[0]
        base, group["lr"] = group["lr"], group["lr"] * (1.0 + 0.01 * count)
        optimizer.step()
        group["lr"] = base
        scaler._per_optimizer_states[id(optimizer)]["stage"] = torch.amp.grad_scaler.OptState.STEPPED
        scaler.update()
        scheduler.step()

    for (name, a), b in zip(governed[0].state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert governed[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert governed[3].state_dict() == scaler.state_dict()
    assert governor.controller.told == [counted]

    records = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()[1:]]
    back = [r for r in records if r["executed"]["directive"] == "rollback"]
    assert [(r["step"], r["restored_step"], r["lost_steps"]) for r in back] == [(BACK_AT, GOOD, [GOOD, BACK_AT])]


def test_without_a_scheduler_among_the_stateful_the_schedule_goes_on():
    model, optimizer, scheduler, _ = everything()
    Governor(optimizer, Counting(), model=model, authority=AUTHORITY)
    for step in range(STEPS):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**STEPS)


def test_what_an_optimizer_keeps_in_its_groups_goes_back_too(make_mlp):
    """Prodigy's d, Schedule-Free's step count: state that no parameter has."""
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    group |= {"d": 1e-6, "k": 3, "weight_sum": torch.tensor(2.0)}
    held = group["weight_sum"]
    snapshot = Snapshot(optimizer, 1 << 20)
    snapshot.take(0)
    group |= {"d": 1e-3, "k": 9, "lr": 0.5}
    group["weight_sum"].mul_(7)
    snapshot.restore()
    assert (group["d"], group["k"], float(group["weight_sum"])) == (1e-6, 3, 2.0)
    assert group["weight_sum"] is held
    assert group["lr"] == 0.5  # what a schedule that goes on has written stays


def test_under_lora_only_the_trained_weights_are_copied():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tokens = torch.arange(16).view(1, 16)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    snapshot = Snapshot(optimizer, 1 << 30, model)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    counters = 4 * len(trained)
    assert snapshot.bytes_needed() == 3 * 4 * sum(p.numel() for p in trained) + counters + buffers
    assert snapshot.bytes_needed() < sum(p.numel() * 4 for p in model.parameters()) / 2
    before = copy.deepcopy(model.state_dict())
    snapshot.take(2)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    snapshot.restore()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_a_state_that_cannot_be_put_back_still_costs_no_poisoned_step(make_mlp, monkeypatch):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = Governor(optimizer, Counting(), authority=AUTHORITY)

    def broken():
        raise RuntimeError("host memory is gone")

    monkeypatch.setattr(governor._last_good.snapshot, "restore", broken)
    for step in range(BACK_AT + 1):
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        before = [p.detach().clone() for p in model.parameters()]
        if step == BACK_AT:
            model[0].weight.grad.fill_(math.nan)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert governor.summary()["faults"] == {"snapshot": 1}


def test_unhealthy_states_never_become_the_last_good_one(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    authority = Authority(max_rollbacks=1, snapshot_every=1)
    regimes = ["steady", "steady", "loss-spike", "overshoot", "diverged", "gradient-burst"]

    class Names(Counting):
        def act(self, telemetry):
            return Action(regime=regimes[int(telemetry.step)])

    governor = Governor(optimizer, Names(), authority=authority)
    for step in range(len(regimes)):
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    assert governor._last_good.step == 1


def test_lbw_guard_goes_on_with_half_the_caution_factor_of_the_good_state():
    guard = LBWGuard()
    good = guard.state_dict()
    guard.load_state_dict(good)
    guard.rolled_back()
    assert guard.state_dict()["caution"] == good["caution"] / 2
