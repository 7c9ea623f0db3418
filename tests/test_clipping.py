"""Clipping by the run's own norms: analytic answers, a burst, poisoned gradients, and the packages themselves."""

import math

import pytest
import torch

from lbw_rl.envs.clipping import AdaGC, GlobalNorm, ZClip, adagc_warmup, build_clipping
from lbw_rl.envs.recipe import OptimizerSpec


class Plain(torch.nn.Module):
    """Two weights whose gradients a test writes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(4))
        self.b = torch.nn.Parameter(torch.zeros(3, 3))

    def gradients(self, norm_a: float, norm_b: float | None) -> None:
        """Uniform gradients of the given norms; None for no gradient."""
        self.a.grad = torch.full((4,), norm_a / 2.0)
        self.b.grad = None if norm_b is None else torch.full((3, 3), norm_b / 3.0)

    def norms(self) -> tuple[float, float]:
        return self.a.grad.norm().item(), self.b.grad.norm().item()


def adagc(model: Plain, warmup: int) -> AdaGC:
    return AdaGC(model.parameters(), warmup_steps=warmup)


# ---- AdaGC


def test_adagc_follows_its_equations():
    model = Plain()
    clip = adagc(model, 2)
    model.gradients(3.0, 4.0)
    assert clip().item() == pytest.approx(5.0)  # before clipping
    assert model.norms() == pytest.approx((0.6, 0.8))  # all by 1/5
    model.gradients(0.3, 0.4)
    clip()
    assert model.norms() == pytest.approx((0.3, 0.4))  # under the limit
    assert clip.thresholds.tolist() == pytest.approx([0.3, 0.4])  # the smaller ones
    model.gradients(0.2, 4.0)
    assert clip().item() == pytest.approx(math.hypot(0.2, 4.0))
    assert model.norms() == pytest.approx((0.2, 1.05 * 0.4))  # tensor by tensor
    assert clip.thresholds.tolist() == pytest.approx([0.98 * 0.3 + 0.02 * 0.2, 0.98 * 0.4 + 0.02 * 1.05 * 0.4])


def test_adagc_holds_a_burst_to_a_step_s_growth_and_recovers_at_once():
    model = Plain()
    clip = adagc(model, 5)
    for _ in range(50):
        model.gradients(0.5, 0.7)
        clip()
    model.gradients(500.0, 0.7)
    clip()
    assert model.norms() == pytest.approx((1.05 * 0.5, 0.7))  # the other tensor has no part in it
    assert clip.thresholds[0].item() == pytest.approx(0.5 * (0.98 + 0.02 * 1.05))
    model.gradients(0.5, 0.7)
    clip()
    assert model.norms() == pytest.approx((0.5, 0.7))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("warmup", [0, 50])
def test_a_poisoned_gradient_enters_no_threshold_of_adagc_and_is_left_for_others_to_see(poison, warmup):
    model = Plain()
    clip = adagc(model, warmup)
    for _ in range(20):
        model.gradients(0.5, 0.7)
        clip()
    before = clip.thresholds.clone()
    model.gradients(poison, 0.7)
    assert not math.isfinite(clip().item())
    assert not model.a.grad.isfinite().any()
    assert model.b.grad.norm().item() == pytest.approx(0.7)
    torch.testing.assert_close(clip.thresholds, before)
    model.gradients(50.0, 0.7)
    clip()
    assert model.norms()[0] < 1.05


def test_a_zero_gradient_does_not_shut_a_tensor_out_for_ever():
    """As LoRA's A has at its first step, since B = 0; γ = 0 would be an absorbing state."""
    model = Plain()
    clip = adagc(model, 3)
    for _ in range(3):
        model.gradients(0.0, 0.5)
        clip()
    for _ in range(5):
        model.gradients(0.4, 0.5)
        clip()
    assert model.norms() == pytest.approx((0.4, 0.5))


def test_a_tensor_without_gradient_takes_no_part():
    model = Plain()
    clip = adagc(model, 1)
    model.gradients(0.4, None)
    clip()
    assert clip.thresholds.tolist() == pytest.approx([0.4, math.inf])
    model.gradients(0.4, 0.6)
    clip()
    assert clip.thresholds.tolist() == pytest.approx([0.4, 0.6])
    model.a.grad = model.b.grad = None
    assert clip().item() == 0.0


def test_adagc_over_adamw_is_pytorch_optimizer_s_adagc():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="needs the extra lbw-rl[rivals]")
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(6, 5) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    clip = AdaGC(ours.parameters(), warmup_steps=6)
    adamw = torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0.1)
    # It counts steps from 1 and warms up while step < warmup_steps.
    reference = pytorch_optimizer.AdaGC(
        theirs.parameters(), lr=0.01, betas=(0.9, 0.999), weight_decay=0.1, warmup_steps=7
    )
    for step in range(20):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p) * (40.0 if step == 12 else 1.0)
            q.grad = p.grad.clone()
        clip()
        adamw.step()
        reference.step()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_adagc_warms_up_for_a_tenth_of_a_short_run():
    assert [adagc_warmup(n) for n in (1, 150, 300, 1000, 100_000)] == [1, 15, 30, 100, 100]


# ---- ZClip


@pytest.fixture
def zclip():
    return pytest.importorskip("zclip", reason="needs the extra lbw-rl[rivals]")


def test_zclip_scales_a_burst_as_its_paper_says(zclip):
    model = Plain()
    clip = ZClip(model, None)
    norms = [1.0 + 0.1 * (-1) ** i for i in range(25)]
    for norm in norms:
        model.gradients(norm, 0.0)
        assert clip().item() == pytest.approx(norm)
        assert model.norms()[0] == pytest.approx(norm)  # warmup: nothing is clipped
    mean = sum(norms) / 25
    deviation = math.sqrt(sum((n - mean) ** 2 for n in norms) / 25)
    model.gradients(300.0, 0.0)
    assert clip().item() == pytest.approx(300.0)
    z = (300.0 - mean) / deviation
    assert model.norms()[0] == pytest.approx(mean + 2.5**2 * deviation / z, rel=1e-4)
    model.gradients(1.0, 0.0)
    clip()
    assert model.norms()[0] == pytest.approx(1.0)


@pytest.mark.parametrize("limit", [None, 1.0])
def test_zclip_is_the_package_s(zclip, limit):
    ours, theirs = Plain(), Plain()
    clip = build_clipping(OptimizerSpec(adaptive_clip="zclip", grad_clip=limit), ours, 100)
    package = zclip.ZClip(max_grad_norm=limit)  # at its defaults
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        burst = 20.0 if step in (30, 31, 50) else 1.0
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = burst * torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        assert clip().item() == pytest.approx(package.step(theirs))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters()))


def test_one_nan_ends_zclip_s_clipping(zclip):
    """A flaw of the package, kept and stated: the rival is what a user would get."""
    model = Plain()
    clip = ZClip(model, None)
    for _ in range(30):
        model.gradients(1.0, 1.0)
        clip()
    model.gradients(math.nan, 1.0)
    assert math.isnan(clip().item())
    for _ in range(50):
        model.gradients(1.0, 1.0)
        clip()
    model.gradients(1e6, 1.0)
    clip()
    assert model.norms()[0] == pytest.approx(1e6)


# ---- the choice


def test_a_recipe_chooses():
    model = Plain()
    model.a.requires_grad_(False)
    assert build_clipping(OptimizerSpec(), model, 10) is None
    fixed = build_clipping(OptimizerSpec(grad_clip=0.5), model, 10)
    assert isinstance(fixed, GlobalNorm)
    model.gradients(9.0, 2.0)
    model.a.grad = None
    assert fixed().item() == pytest.approx(2.0)
    assert model.b.grad.norm().item() == pytest.approx(0.5, rel=1e-4)
    adaptive = build_clipping(OptimizerSpec(adaptive_clip="adagc"), model, 10)
    assert len(adaptive.thresholds) == 1
