"""Control per group and per tensor: split, scaled within the authority, and merged again in checkpoints."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbw_rl import Action, Authority, Controller, Governor
from lbw_rl.enforcer import Enforcer
from lbw_rl.param_groups import split_parameter_groups


class Groups(Controller):
    name = "groups"

    def __init__(self, *scales, lr_scale=1.0):
        self.action = Action(lr_scale=lr_scale, group_lr_scales=scales)

    def reset(self, context):
        self.groups = context.groups

    def act(self, telemetry):
        return self.action


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def grouped(model, named=False):
    parameters = list(model.named_parameters() if named else model.parameters())
    return torch.optim.AdamW(
        [{"params": parameters[::2], "lr": 1e-2}, {"params": parameters[1::2], "lr": 3e-3, "weight_decay": 0.0}]
    )


def test_each_group_gets_its_own_scale_on_top_of_the_common_one(make_mlp):
    model, reference = make_mlp(), make_mlp()
    optimizer, by_hand = grouped(model), grouped(reference)
    Governor(optimizer, Groups(0.5, 2.0, lr_scale=0.5), authority=Authority(lr_scale=(0.1, 2.0)))
    train(model, optimizer, range(5))
    for group, scale in zip(by_hand.param_groups, (0.25, 1.0), strict=True):
        group["lr"] *= scale
    train(reference, by_hand, range(5))
    assert all(torch.equal(a, b) for a, b in zip(bits(model), bits(reference), strict=True))
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 3e-3]


@given(
    st.lists(st.lists(st.floats(0, 1e6), min_size=3, max_size=3), min_size=1, max_size=8),
    st.lists(st.floats(0, 1e6), min_size=8, max_size=8),
)
def test_no_group_leaves_the_authority_or_outruns_the_slew_limit(groups, scales):
    authority = Authority(lr_scale=(0.1, 5.0), slew_up=1.5)
    enforcer = Enforcer(authority)
    previous = [1.0, 1.0, 1.0]
    for proposed, scale in zip(groups, scales, strict=False):
        action = enforcer.rule(Action(lr_scale=scale, group_lr_scales=tuple(proposed)), groups=3).action
        whole = [action.lr_scale * g for g in action.group_lr_scales]
        for now, before in zip(whole, previous, strict=True):
            assert 0.1 * (1 - 1e-9) <= now <= 5.0 * (1 + 1e-9)
            assert now <= max(before, 0.1) * 1.5 * (1 + 1e-9)
        previous = whole


@pytest.mark.parametrize("scales", [(0.5,), (1.0, float("nan")), (1.0, -1.0), (1.0, "2"), [1.0, 1.0]])
def test_malformed_group_scales_are_a_controller_fault(scales, make_mlp):
    model = make_mlp()
    optimizer = grouped(model)
    controller = Groups()
    controller.action = Action(lr_scale=0.5, group_lr_scales=scales)
    governor = Governor(optimizer, controller)
    train(model, optimizer, range(2))
    assert governor.summary()["regimes"] == {"fault": 2}


@pytest.mark.parametrize("named", [False, True])
def test_split_groups_change_nothing_by_themselves_and_are_named(make_mlp, named):
    model, reference = make_mlp(), make_mlp()
    optimizer, unsplit = grouped(model, named), grouped(reference, named)
    names = split_parameter_groups(optimizer)
    controller = Groups()
    Governor(optimizer, controller)
    assert list(controller.groups) == names
    assert set(names) == ({n for n, _ in model.named_parameters()} if named else set(names))
    assert len(names) == len(list(model.parameters()))
    train(model, optimizer, range(4))
    train(reference, unsplit, range(4))
    assert all(torch.equal(a, b) for a, b in zip(bits(model), bits(reference), strict=True))


@pytest.mark.parametrize("named", [False, True])
def test_state_dicts_cross_between_the_split_and_the_unsplit_optimizer(make_mlp, named):
    """A run governed per tensor resumes without the split, and the other way round, bit for bit."""

    def straight():
        model = make_mlp()
        optimizer = grouped(model, named)
        train(model, optimizer, range(6))
        return bits(model)

    for first, then in [(True, False), (False, True), (True, True)]:
        model = make_mlp()
        optimizer = grouped(model, named)
        if first:
            split_parameter_groups(optimizer)
        train(model, optimizer, range(3))
        state = copy.deepcopy(optimizer.state_dict())
        assert [len(g["params"]) for g in state["param_groups"]] == [2, 2]
        optimizer = grouped(model, named)
        if then:
            split_parameter_groups(optimizer)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(3, 6))
        assert all(torch.equal(a, b) for a, b in zip(bits(model), straight(), strict=True)), (first, then)
        assert [g["lr"] for g in optimizer.param_groups] == ([1e-2, 1e-2, 3e-3, 3e-3] if then else [1e-2, 3e-3])


def test_splitting_after_a_scheduler_is_built_is_refused(make_mlp):
    optimizer = grouped(make_mlp())
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    with pytest.raises(
        ValueError, match=r"a scheduler has been built .* accepted: split_parameter_groups\(optimizer\) first"
    ):
        split_parameter_groups(optimizer)


def test_splitting_twice_is_refused(make_mlp):
    optimizer = grouped(make_mlp())
    split_parameter_groups(optimizer)
    with pytest.raises(ValueError, match="split already"):
        split_parameter_groups(optimizer)


def test_a_tensor_rate_is_scaled_per_group_in_place(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2))
    names = split_parameter_groups(optimizer)
    Governor(optimizer, Groups(*(0.5 + 0.1 * i for i in range(len(names)))))
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([float(g["lr"]) for g in o.param_groups]))
    train(model, optimizer, range(1))
    assert seen[0] == pytest.approx([1e-2 * (0.5 + 0.1 * i) for i in range(len(names))])
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([1e-2] * len(names))
