"""The fleet's signals against the probe's, and the batched entropies against the scalar ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from measuring import Measuring
from one_model import batches_for, fleet_of, reference

from lbw_rl.entropy import direction_entropy, element_entropy, histogram_entropy
from lbw_rl.envs.fleet_signals import FleetProbe, direction_entropies, element_entropies, gradient_entropies

NOT_OF_PROXIES = {"grad_entropy_softmax", "grad_entropy_tensor"}
"""Signals of the probe that nobody has asked of a fleet: missing there."""


def test_signals_equal_those_of_the_probe() -> None:
    """Every signal of the fleet is what `lbw_rl.probe` measures on the same model."""
    n, steps, every = 2, 9, 2
    fleet, tokens = fleet_of(n), batches_for(n, steps)
    ours = FleetProbe(fleet, stride=1)
    lr, beta1, beta2 = np.array([1e-2, 3e-2]), np.full(n, 0.9), np.array([0.99, 0.95])
    models = [reference(fleet, i)[0] for i in range(n)]
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=lr[i], betas=(0.9, beta2[i]), weight_decay=0.0)
        for i, m in enumerate(models)
    ]
    theirs = [Measuring(o, sample=10**6) for o in optimizers]
    compared = set()
    for t in range(steps):
        losses = fleet.backward(tokens[t])
        measured = ours.measure(losses, beta2) if t % every == 0 else None
        last_of_window = (t + 1) % every == 0
        if last_of_window:
            ours.before_step()
        fleet.step(lr, beta1, beta2)
        if last_of_window:
            ours.after_step()
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = model(input_ids=tokens[t, i], labels=tokens[t, i]).loss
            loss.backward()
            if measured is not None:
                for name, value in theirs[i].measure(loss).items():
                    if name in NOT_OF_PROXIES:
                        continue
                    assert measured[name][i] == pytest.approx(value, rel=0.01, abs=2e-3), (name, t)
                    compared.add(name)
            if last_of_window:
                theirs[i].before_step()
            optimizer.step()
            if last_of_window:
                theirs[i].after_step()
    assert compared >= {"loss", "grad_norm", "grad_entropy", "grad_cosine", "surprise", "update_ratio", "weight_rms"}
    assert compared >= {"grad_entropy_element", "grad_entropy_direction"}
    assert not NOT_OF_PROXIES & set(measured or {})


def test_measuring_some_rows_leaves_the_rest_unmeasured() -> None:
    fleet, tokens = fleet_of(3), batches_for(3, 1)
    probe = FleetProbe(fleet)
    losses = fleet.backward(tokens[0])
    everything, some = probe.measure(losses, np.full(3, 0.99)), probe.measure(losses, np.full(3, 0.99), rows=[1])
    assert np.isnan(some["grad_norm"][[0, 2]]).all()
    assert some["grad_entropy"][1] == everything["grad_entropy"][1]
    assert np.isnan(everything["surprise"]).all()  # no second moment yet


def test_nonfinite_gradient_is_flagged_and_never_the_reference() -> None:
    fleet, tokens = fleet_of(2), batches_for(2, 3)
    probe, beta2 = FleetProbe(fleet), np.full(2, 0.99)
    probe.measure(fleet.backward(tokens[0]), beta2)
    losses = fleet.backward(tokens[1])
    fleet.grads[0, 0] = float("inf")
    assert probe.measure(losses, beta2)["nonfinite"].tolist() == [1.0, 0.0]
    assert np.isfinite(probe.measure(fleet.backward(tokens[2]), beta2)["grad_cosine"]).all()


def test_batched_entropies_equal_the_scalar_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    g = torch.randn(4, 999, generator=generator) * torch.tensor([[1.0], [1e-6], [1e3], [0.0]])
    mean = torch.randn(4, 999, generator=generator)
    g[0, :100] = 0.0
    mean[2] = torch.nan
    assert gradient_entropies(g).tolist() == pytest.approx([histogram_entropy(row.numpy()) for row in g], abs=1e-6)
    expected = [element_entropy(row.numpy()) for row in g[:3]]
    assert element_entropies(g)[:3].tolist() == pytest.approx(expected, abs=1e-6)
    expected = [direction_entropy(row.numpy(), m.numpy()) for row, m in zip(g, mean, strict=True)]
    assert direction_entropies(g, mean).tolist() == pytest.approx(expected, abs=1e-5, nan_ok=True)
