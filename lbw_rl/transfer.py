"""Device to host without waiting: what is copied now is read one decision later."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


class Transfer:
    """A copy under way from the device; on the CPU there is nothing to wait for.

    On an accelerator the copy goes to pinned memory in the order of the stream. `result` waits for that copy alone, not
    for the device: read one decision later, it is there unless the host runs more than a decision ahead.

    Args:
        values: 1-d float32, not written to afterwards.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._event: torch.Event | None = None
        if values.device.type == "cpu":
            self._host = values
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.Event(device=values.device)
        self._event.record()

    def result(self) -> NDArray[np.float32]:
        """The values on the host."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host.numpy()
