"""The tap on torch's clipping: hears what concerns its optimizer, and leaves torch as it was."""

import gc

import pytest
import torch

from lbw_rl import Governor, clip_tap
from lbw_rl.clip_tap import ClipTap


@pytest.fixture(autouse=True)
def original():
    for tap in list(clip_tap._listeners):  # of governors that other tests have left behind
        tap.close()
    function = torch.nn.utils.clip_grad_norm_
    yield function
    torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad.clip_grad_norm_ = function


def parameters(n=3):
    ps = [torch.nn.Parameter(torch.ones(4)) for _ in range(n)]
    for p in ps:
        p.grad = torch.full((4,), 2.0)
    return ps


def test_it_hears_the_norm_before_clipping_of_all_gradients_and_of_nothing_less():
    heard = []
    ps = parameters()
    tap = ClipTap(torch.optim.SGD(ps, lr=0.1), lambda norm: heard.append(float(norm)))
    torch.nn.utils.clip_grad_norm_(ps[:2], 1e9)  # a part of them
    torch.nn.utils.clip_grad_norm_(parameters(), 1e9)  # another model's
    torch.nn.utils.clip_grad_norm_(ps, 1e9, norm_type=1.0)  # another norm
    assert heard == []
    norm = torch.nn.utils.clip_grad_norm_((p for p in ps), 0.5)  # a generator, read once
    assert heard == [float(norm)] == [pytest.approx((3 * 4 * 2.0**2) ** 0.5)]
    assert float(ps[0].grad[0]) == pytest.approx(2.0 * 0.5 / float(norm), rel=1e-4)  # and it did clip
    ps[2].grad = None  # what takes no part need not be clipped
    torch.nn.utils.clip_grad_norm_(ps[:2], 1e9)
    assert len(heard) == 2
    tap.close()


def test_the_last_tap_puts_torch_s_function_back(original):
    taps = [ClipTap(torch.optim.SGD(parameters(), lr=0.1), lambda _: None) for _ in range(2)]
    taps[0].close()
    assert torch.nn.utils.clip_grad_norm_ is not original
    taps[1].close()
    taps[1].close()
    assert torch.nn.utils.clip_grad_norm_ is original
    assert torch.nn.utils.clip_grad.clip_grad_norm_ is original


def test_a_wrapper_that_someone_put_around_ours_stays():
    governor = Governor(torch.optim.SGD(parameters(), lr=0.1), "constant")
    ours = torch.nn.utils.clip_grad_norm_

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = theirs
    governor.close()
    assert torch.nn.utils.clip_grad_norm_ is theirs
    torch.nn.utils.clip_grad_norm_(parameters(), 1.0)  # and still clips


def test_a_governor_that_nobody_closed_takes_its_tap_along(original):
    def forget():
        Governor(torch.optim.SGD(parameters(), lr=0.1), "constant")

    forget()
    gc.collect()
    assert torch.nn.utils.clip_grad_norm_ is original
