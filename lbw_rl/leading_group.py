"""Which parameter group's rate and momentum stand for the run's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lbw_rl.sgd_rate import rate_on_host


class LeadingGroup:
    """The first group that trains: one whose scheduled rate is above 0. Once found it stays, whatever its rate does later.

    With gradual unfreezing the first groups wait at a rate of 0, of which there is no scale. Where no rate can be read, or
    all are 0 (a warmup from 0), it is the first group until one is found.

    Args:
        optimizer: whose groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.index: int | None = None

    def __call__(self) -> Mapping[str, Any]:
        """The group."""
        groups = self._optimizer.param_groups
        if self.index is None:
            self.index = next((i for i, group in enumerate(groups) if rate_on_host(group) > 0), None)
        return groups[self.index if self.index is not None and self.index < len(groups) else 0]
