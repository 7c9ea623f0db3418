"""The probe's signals against a readable reference over full tensors, and on inputs that break naive probes."""

import math

import entropy_reference
import numpy as np
import pytest
import torch
from measuring import Measuring

from lbw_rl import SIGNALS
from lbw_rl.entropy import ESTIMATORS

BETAS, EPS = (0.9, 0.99), 1e-8


def backward(model, seed, scale=1.0):
    model.zero_grad()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    loss = scale * model(x).square().mean()
    loss.backward()
    return loss.detach()


def measured_step(probe, optimizer, loss=None, grad_norm=None):
    values = probe.measure(loss, grad_norm)
    probe.before_step()
    optimizer.step()
    probe.after_step()
    return values


# ---- the readable reference: every element, float64


def flat(tensors):
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])


class Reference:
    """All signals of the probe, recomputed by definition on the whole model, with AdamW's own v."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.matrices = [p for p in model.parameters() if p.ndim >= 2]
        self.size = sum(p.numel() for p in self.matrices)
        self.gradient = self.mean = self.before = self.update = None

    def measure(self):
        g = flat([p.grad for p in self.matrices])
        values = {
            "grad_norm": np.linalg.norm(flat([p.grad for p in self.model.parameters()])),
            "grad_entropy": entropy_reference.histogram(g),
            "grad_entropy_softmax": entropy_reference.softmax(g),
            "grad_entropy_element": entropy_reference.element(g),
            "grad_entropy_tensor": entropy_reference.tensor([p.grad.numpy() for p in self.matrices]),
        }
        if self.gradient is not None:
            values["grad_entropy_direction"] = entropy_reference.direction(g, self.mean)
            values["grad_cosine"] = g @ self.gradient / np.linalg.norm(g) / np.linalg.norm(self.gradient)
            values["surprise"] = self.surprise(g)
        if self.update is not None:
            values["update_ratio"], values["weight_rms"] = self.update
        self.mean = g if self.gradient is None else self.mean + 0.1 * (g - self.mean)
        self.gradient, self.before = g, flat(self.matrices)
        return values

    def surprise(self, g):
        state = [self.optimizer.state[p] for p in self.matrices]
        v = BETAS[1] * flat([s["exp_avg_sq"] for s in state]) + (1 - BETAS[1]) * g**2
        v /= 1 - BETAS[1] ** (float(state[0]["step"]) + 1)
        return np.sqrt(np.mean(g**2 / np.maximum(v, EPS**2)))

    def after_step(self):
        moved = flat(self.matrices) - self.before
        self.update = np.linalg.norm(moved) / np.linalg.norm(self.before), np.sqrt(np.mean(self.before**2))


def test_every_signal_equals_the_full_reference_where_the_sample_is_the_whole(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=BETAS, eps=EPS)
    probe, reference = Measuring(optimizer), Reference(model, optimizer)
    for step in range(5):
        loss = backward(model, step)
        expected = reference.measure()
        values = measured_step(probe, optimizer, loss)
        reference.after_step()
        assert values.pop("loss") == pytest.approx(loss.item())
        assert values.pop("nonfinite") == 0.0
        assert values == pytest.approx(expected, rel=1e-4)
    assert set(values) | {"loss", "nonfinite"} <= set(SIGNALS)


def test_a_sample_of_a_larger_model_is_close_to_the_full_reference():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=BETAS, eps=EPS)
    probe, reference = Measuring(optimizer), Reference(model, optimizer)
    for step in range(4):
        loss = backward(model, step)
        expected = reference.measure()
        values = measured_step(probe, optimizer, loss)
        reference.after_step()
        elements = probe.probe.sample_size
        assert elements < sum(p.numel() for p in model.parameters()) / 5
        assert values["grad_norm"] == pytest.approx(expected.pop("grad_norm"), rel=1e-5)  # of all elements
        # An entropy of shares is normalised by the log of its own n: what a sample keeps is the distance from uniform.
        (whole,) = [expected.pop("grad_entropy_element")]
        missing = [
            (1 - h) * math.log(n) for h, n in ((values["grad_entropy_element"], elements), (whole, reference.size))
        ]
        assert missing[0] == pytest.approx(missing[1], rel=0.1)
        for name, value in expected.items():
            error = 5 / math.sqrt(elements)  # five standard errors of a cosine, and of a mean of unit spread
            absolute = error if name == "grad_cosine" else 0
            assert values[name] == pytest.approx(value, rel=2 * error, abs=absolute), name


def test_the_sample_favours_no_column():
    for shape in [(64, 48), (300, 64), (1000, 7), (33, 32)]:
        probe = Measuring(torch.optim.SGD([torch.nn.Parameter(torch.zeros(shape))], lr=1.0), sample=256)
        probe.before_step()
        (stride,) = [part.stride for part in probe.probe._sample.parts]
        columns = np.bincount(np.arange(0, math.prod(shape), stride) % shape[1], minlength=shape[1])
        assert columns.max() - columns.min() <= 1


# ---- update ratio, cosine, norm


def test_update_ratio_of_plain_sgd_is_rate_times_gradient_over_weight(make_mlp):
    model, lr = make_mlp(), 0.03
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    probe = Measuring(optimizer)
    loss = backward(model, 0)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    expected = lr * np.linalg.norm(flat([p.grad for p in matrices])) / np.linalg.norm(flat(matrices))
    measured_step(probe, optimizer, loss)
    assert probe.measure(loss, None)["update_ratio"] == pytest.approx(expected, rel=1e-5)


def test_cosine_of_equal_gradients_is_one_and_of_opposite_ones_minus_one(make_mlp):
    model = make_mlp()
    probe = Measuring(torch.optim.SGD(model.parameters(), lr=0.0))
    assert "grad_cosine" not in probe.measure(backward(model, 0), None)
    assert probe.measure(backward(model, 0, scale=5.0), None)["grad_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert probe.measure(backward(model, 0, scale=-1.0), None)["grad_cosine"] == pytest.approx(-1.0, abs=1e-5)


def test_a_norm_that_the_caller_passes_wins(make_mlp):
    model = make_mlp()
    probe = Measuring(torch.optim.SGD(model.parameters(), lr=0.1))
    loss = backward(model, 0)
    assert probe.measure(loss, 123.0)["grad_norm"] == 123.0
    assert probe.measure(loss, torch.tensor(7.0))["grad_norm"] == 7.0
    assert probe.measure(loss, math.nan)["nonfinite"] == 1.0


def test_a_matrix_that_starts_at_zero_has_no_relative_update():
    p = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.SGD([p], lr=0.1)
    probe = Measuring(optimizer)
    p.grad = torch.ones(4, 4)
    measured_step(probe, optimizer)
    assert math.isnan(probe.measure(None, None)["update_ratio"])


# ---- poison


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("caller_norm", [None, 1.0], ids=["own-norm", "caller-norm"])
def test_a_poisoned_gradient_never_becomes_the_reference(make_mlp, poison, caller_norm):
    model = make_mlp()
    probe = Measuring(torch.optim.SGD(model.parameters(), lr=0.0))
    probe.measure(backward(model, 0), caller_norm)
    loss = backward(model, 1)
    model[0].weight.grad[0, 0] = poison
    poisoned = probe.measure(loss, caller_norm)
    assert all(not math.isinf(v) for v in poisoned.values())
    if caller_norm is None:
        assert poisoned["nonfinite"] == 1.0
        assert math.isnan(poisoned["grad_norm"])
    assert math.isnan(poisoned["grad_entropy"])
    model.zero_grad()
    probe.measure(loss, None)  # and no gradient at all in between
    assert probe.measure(backward(model, 0), caller_norm)["grad_cosine"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_non_finite_loss_is_flagged_and_reads_missing(make_mlp, loss):
    model = make_mlp()
    backward(model, 0)
    values = Measuring(torch.optim.SGD(model.parameters(), lr=0.1)).measure(loss, None)
    assert values["nonfinite"] == 1.0
    assert math.isnan(values["loss"])
    assert math.isfinite(values["grad_norm"])


# ---- unusual parameters


def test_sparse_gradients_measure_like_dense_ones():
    def run(sparse):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(20, 4, sparse=sparse)
        optimizer = torch.optim.SGD(embedding.parameters(), lr=0.5)
        probe = Measuring(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            embedding(torch.tensor([1, 1, 5, 7])).square().sum().backward()
            values = measured_step(probe, optimizer)
        return values

    assert run(sparse=True) == pytest.approx(run(sparse=False), rel=1e-5)


def test_parameters_without_gradient_or_state_are_passed_over(make_mlp):
    model, idle = make_mlp(), torch.nn.Parameter(torch.ones(6, 6))
    with_idle = torch.optim.AdamW([*model.parameters(), idle], lr=1e-2, betas=BETAS, eps=EPS)
    probe, reference = Measuring(with_idle), Reference(model, with_idle)
    for step in range(3):
        loss = backward(model, step)
        expected = reference.measure()
        values = measured_step(probe, with_idle, loss)
        reference.after_step()
    assert values["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert values["surprise"] == pytest.approx(expected["surprise"], rel=1e-4)
    assert values["grad_cosine"] == pytest.approx(expected["grad_cosine"], rel=1e-4)


def test_frozen_parameters_do_not_dilute_the_ratio_and_join_when_unfrozen(make_mlp):
    model, backbone = make_mlp(), torch.nn.Parameter(torch.full((50, 50), 10.0), requires_grad=False)
    optimizer = torch.optim.SGD([*model.parameters(), backbone], lr=0.1)
    probe, reference = Measuring(optimizer), Reference(model, optimizer)
    loss = backward(model, 0)
    reference.measure()
    measured_step(probe, optimizer, loss)
    reference.after_step()
    assert probe.measure(None, None)["update_ratio"] == pytest.approx(reference.update[0], rel=1e-4)
    backbone.requires_grad_(True)
    measured_step(probe, optimizer, backward(model, 1))
    assert probe.measure(None, None)["weight_rms"] > 9


def test_a_group_added_in_mid_run_joins_the_sample(make_mlp):
    model, other = make_mlp(), torch.nn.Parameter(torch.full((10, 10), 100.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Measuring(optimizer)
    measured_step(probe, optimizer, backward(model, 0))
    optimizer.add_param_group({"params": [other]})
    measured_step(probe, optimizer, backward(model, 1))
    assert probe.measure(None, None)["weight_rms"] > 40


def test_no_gradient_and_no_loss_measure_nothing(make_mlp):
    assert Measuring(torch.optim.SGD(make_mlp().parameters(), lr=0.1)).measure(None, None) == {}


def test_an_optimizer_of_several_eps_is_measured(make_mlp):
    """CAME has two, and three betas."""
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for group in optimizer.param_groups:
        group |= {"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)}
    probe = Measuring(optimizer)
    measured_step(probe, optimizer, backward(model, 0))
    assert probe.measure(None, None)["update_ratio"] > 0


def test_vectors_are_sampled_where_there_is_no_matrix():
    p = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([p], lr=0.1)
    probe = Measuring(optimizer)
    p.grad = torch.ones(10)
    measured_step(probe, optimizer)
    assert probe.measure(None, None)["update_ratio"] == pytest.approx(0.1)


def test_every_optimizer_is_measured_and_none_is_disturbed(make_optimizer, make_mlp):
    model = make_mlp()
    optimizer = make_optimizer(model.parameters())
    probe = Measuring(optimizer)
    for step in range(3):
        values = measured_step(probe, optimizer, backward(model, step))
    expected = {"loss", "grad_norm", "grad_cosine", "update_ratio", "weight_rms", "nonfinite"}
    expected |= {signal for signal, _ in ESTIMATORS.values()}
    keeps_v = any("exp_avg_sq" in s for s in optimizer.state.values())
    assert set(values) == expected | ({"surprise"} if keeps_v else set())
    assert all(math.isfinite(v) for v in values.values())


def test_closure_style_optimizers_do_not_crash(make_mlp):
    model = make_mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    probe = Measuring(optimizer)
    for step in range(3):
        probe.measure(None, None)
        probe.before_step()
        optimizer.step(lambda: backward(model, step).requires_grad_())  # noqa: B023
        probe.after_step()
    assert probe.measure(None, None)["update_ratio"] > 0


def test_half_precision_weights_are_measured_in_full():
    p = torch.nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=0.5)
    probe = Measuring(optimizer)
    p.grad = torch.full((16, 16), 0.25, dtype=torch.bfloat16)
    values = measured_step(probe, optimizer)
    assert values["grad_norm"] == pytest.approx(4.0)
    assert probe.measure(None, None)["update_ratio"] == pytest.approx(0.125)


# ---- state


def test_state_round_trip_measures_alike_from_there_on(make_mlp, tmp_path):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    original, restored = Measuring(optimizer), Measuring(optimizer)
    for step in range(3):
        measured_step(original, optimizer, backward(model, step))
    torch.save(original.state_dict(), tmp_path / "probe.pt")
    restored.load_state_dict(torch.load(tmp_path / "probe.pt", weights_only=True))
    loss = backward(model, 9)
    assert restored.measure(loss, None) == original.measure(loss, None)
