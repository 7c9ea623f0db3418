"""Steps with a closure, and optimizers that are unlike the others: LBFGS, SparseAdam, differentiable ones."""

import copy

import pytest
import torch
from optimizer_variants import (
    WIDE,
    Scripted,
    backward,
    bits,
    make_model,
    make_optimizer,
    same_bits,
    step_by_hand,
)

from lbw_rl import Action, Directive, Governor


def lbfgs_pair(search):
    governed, plain = make_model(), make_model()
    optimizer, reference = (
        torch.optim.LBFGS(m.parameters(), lr=0.2, max_iter=5, line_search_fn=search) for m in (governed, plain)
    )
    return governed, plain, optimizer, reference


SEARCH = pytest.mark.parametrize("search", [None, "strong_wolfe"])


@SEARCH
def test_lbfgs_under_an_idle_governor_equals_itself_bit_for_bit(search):
    """A step of LBFGS runs its closure several times, gradients and all; a decision is made once."""
    governed, plain, optimizer, reference = lbfgs_pair(search)
    governor = Governor(optimizer, "constant")
    for _ in range(4):
        returned = optimizer.step(lambda: backward(governed, 0))
        assert torch.equal(returned, reference.step(lambda: backward(plain, 0)))
    assert same_bits(bits(governed, optimizer), bits(plain, reference))
    assert governor.summary()["decisions"] == governor.step == 4
    assert governor.summary()["faults"] == {}


@SEARCH
def test_lbfgs_executes_a_scale_one_step_late(search):
    """It reads its rate before its closure brings the gradients that a decision needs: what a step executes is the
    scale of the decision before it, equal to a loop that scales by hand."""
    scales = [0.5, 1.0, 2.0, 0.25]
    governed, plain, optimizer, reference = lbfgs_pair(search)
    governor = Governor(optimizer, Scripted(*[Action(lr_scale=s) for s in scales]), authority=WIDE)
    for s in [1.0, *scales[:-1]]:
        returned = optimizer.step(lambda: backward(governed, 0))
        reference.param_groups[0]["lr"] = 0.2 * s
        assert torch.equal(returned, reference.step(lambda: backward(plain, 0)))
    reference.param_groups[0]["lr"] = 0.2
    assert same_bits(bits(governed, optimizer), bits(plain, reference))
    assert governor.summary()["faults"] == {}


def test_a_skipped_step_of_lbfgs_moves_no_weight():
    governed, _, optimizer, _ = lbfgs_pair(None)
    governor = Governor(optimizer, Scripted(Action(), Action(directive=Directive.SKIP)), authority=WIDE)
    optimizer.step(lambda: backward(governed, 0))
    before = copy.deepcopy(governed.state_dict())
    optimizer.step(lambda: backward(governed, 1))
    assert same_bits(governed.state_dict(), before)
    optimizer.step(lambda: backward(governed, 2))
    assert not same_bits(governed.state_dict(), before)
    assert governor.summary()["skips"] == 1
    assert governor.summary()["faults"] == {}


CLOSURES = ["SGD-momentum", "AdamW", "AdamW-fused", "Adafactor", "Muon"]


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "keyword"])
def test_a_step_with_a_closure_equals_the_loop_that_scales_by_hand(name, by_keyword):
    """The closure's own backward runs inside the step, after the hook; its loss comes back to the caller."""
    scales = [1.0, 0.5, 3.0, 0.25]
    governed, plain = make_model(), make_model()
    optimizer, reference = make_optimizer(name, governed), make_optimizer(name, plain)
    governor = Governor(optimizer, Scripted(*[Action(lr_scale=s) for s in scales]), authority=WIDE)
    for step, s in enumerate(scales):

        def closure(step=step):
            return backward(governed, step)

        returned = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert torch.equal(returned, backward(plain, step))
        step_by_hand(reference, s)
    assert same_bits(bits(governed, optimizer), bits(plain, reference))
    assert governor.summary()["faults"] == {}


@pytest.mark.parametrize("name", CLOSURES)
def test_a_skipped_step_with_a_closure_moves_no_weight(name):
    """Skipping is decided before the closure runs; the gradients that it brings must not move anything either."""
    model = make_model()
    optimizer = make_optimizer(name, model)
    governor = Governor(optimizer, Scripted(Action(), Action(directive=Directive.SKIP)), authority=WIDE)
    optimizer.step(lambda: backward(model, 0))
    before = bits(model, optimizer)
    returned = optimizer.step(lambda: backward(model, 1))
    assert same_bits(bits(model, optimizer), before)
    assert torch.equal(returned, backward(model, 1))
    optimizer.step(lambda: backward(model, 2))
    assert not same_bits(model.state_dict(), before[0])
    assert governor.summary()["skips"] == 1
    assert governor.summary()["faults"] == {}


def test_sparse_adam_is_governed_as_by_hand():
    def make():
        torch.manual_seed(3)
        table = torch.nn.Embedding(20, 4, sparse=True)
        return table, torch.optim.SparseAdam(table.parameters(), lr=0.01)

    scales = [1.0, 0.5, 2.0, 4.0]
    (governed, optimizer), (plain, reference) = make(), make()
    governor = Governor(optimizer, Scripted(*[Action(lr_scale=s) for s in scales]), authority=WIDE)
    for step, s in enumerate(scales):
        for table in (governed, plain):
            table.zero_grad()
            table(torch.tensor([step, 3, 3, 7])).square().sum().backward()
        optimizer.step()
        step_by_hand(reference, s)
    assert same_bits(bits(governed, optimizer), bits(plain, reference))
    assert governor.summary()["faults"] == {}


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_differentiable_step_keeps_its_graph(cls):
    """Meta-learning: the derivative of the loss after the step with respect to the weights before it."""

    def derivative(governed, s):
        start = torch.linspace(-1, 1, 6).requires_grad_()
        weights = start.clone()
        weights.retain_grad()
        optimizer = cls([weights], lr=0.1 if governed else 0.1 * s, weight_decay=0.5, differentiable=True)
        if governed:
            Governor(optimizer, Scripted(Action(lr_scale=s)), authority=WIDE)
        weights.grad = torch.linspace(0.1, 0.6, 6)
        optimizer.step()
        return torch.autograd.grad(weights.square().sum(), start)[0]

    assert torch.equal(derivative(True, 3.0), derivative(False, 3.0))
    assert not torch.equal(derivative(True, 3.0), derivative(True, 1.0))
