"""What both environments share: their spaces, and how an action of [-1, 1]² becomes one of the authority's."""

from __future__ import annotations

from typing import cast

import numpy as np
from gymnasium.spaces import Box, Space
from numpy.typing import NDArray

from lbw_rl.action import Action, log_interpolate
from lbw_rl.authority import Authority
from lbw_rl.features import FEATURE_LIMIT, FEATURES

DEFAULT_AUTHORITY = Authority(lr_scale=(1e-2, 1e2), momentum_scale=(0.5, 2.0), slew_up=10.0)
"""Wide enough to repair a hundredfold learning-rate error; symmetric in the log, so that action 0 is neutral."""


def action_space() -> Space[NDArray[np.float32]]:
    """lr_scale and momentum_scale as positions in [-1, 1]."""
    return cast(Space[NDArray[np.float32]], Box(-1.0, 1.0, (2,), np.float32))


def observation_space() -> Space[NDArray[np.float32]]:
    """The feature vector (`lbw_rl.features.FEATURES`)."""
    return cast(Space[NDArray[np.float32]], Box(-FEATURE_LIMIT, FEATURE_LIMIT, (len(FEATURES),), np.float32))


def command(unit: NDArray[np.floating], authority: Authority) -> Action:
    """The action that a point of the action space stands for, before the authority's slew limit.

    Args:
        unit: shape (2,), positions of lr_scale and momentum_scale; clipped to [-1, 1].
        authority: whose ranges they are positions in.

    Raises:
        ValueError: a position that is NaN.
    """
    if np.isnan(unit).any():
        raise ValueError(f"action {unit} holds NaN; accepted: finite numbers, clipped to [-1, 1]")
    lr, momentum = (
        log_interpolate(float(u), bounds)
        for u, bounds in zip(unit, (authority.lr_scale, authority.momentum_scale), strict=True)
    )
    return Action(lr_scale=lr, momentum_scale=momentum)
