"""TensorBoard event files of a governed run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbw_rl.extras import require
from lbw_rl.sinks.families import number
from lbw_rl.sinks.sink import Decision, Sink

if TYPE_CHECKING:
    from lbw_rl.governor import Governor

_QUEUE = 1000  # events that may wait for the disk before the run does


class TensorBoardSink(Sink):
    """Writes signals, scales, counts, evidence and regime as TensorBoard events, one event per decision.

    Tags: `signals/…`, `executed/…`, `proposed/…`, `evidence/…`, `totals/…`, `regimes/…` (decisions so far) and the text
    `regime` wherever it changes. What was not measured is left out. A run that goes on from a checkpoint hides what an
    earlier attempt wrote into the folder after that step.

    Args:
        folder: for the event files; made if it does not exist.
        every: decisions per event.

    Raises:
        ValueError: `every` below 1.
        ModuleNotFoundError: `tensorboard` is not installed; it comes with `lbw-rl[metrics]`.
        OSError: from `open`: the folder cannot be made.
    """

    name = "tensorboard"

    def __init__(self, folder: str | Path, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every: {every} must be at least 1 decision")
        require("tensorboard")
        self.folder, self.every = Path(folder), every
        self._writer: Any = None
        self._regime: str | None = None

    def open(self, governor: Governor) -> None:
        """Makes the folder; the file waits for the first decision, whose step no resume has yet told."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._regime = None

    def decided(self, decision: Decision) -> None:
        """Queues the decision for the writer's own thread."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self.folder), purge_step=decision.step, max_queue=_QUEUE)
        regime = decision.ruled.regime
        if regime != self._regime:
            self._writer.add_text("regime", regime, decision.step)
            self._regime = regime
        if (decision.counts["decisions"] - 1) % self.every:
            return
        # All values in one event: `add_scalar` would make one each, at ten times the cost.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(decision)]
        self._writer.file_writer.add_summary(Summary(value=values), decision.step)

    def close(self) -> None:
        """Brings what is queued to the disk."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def _scalars(decision: Decision) -> Iterator[tuple[str, float]]:
    """Tag and value of all that is a finite number."""
    parts: list[tuple[str, dict[str, Any]]] = [
        ("signals", decision.telemetry.as_dict()),
        ("executed", _scales(decision.executed)),
        ("proposed", _scales(decision.proposed)),
        ("evidence", dict(decision.ruled.evidence)),
        ("totals", {**decision.counts, "faults": sum(decision.faults.values())}),
        ("regimes", dict(decision.regimes)),
    ]
    for part, values in parts:
        for name, value in values.items():
            if math.isfinite(finite := number(value)):
                yield f"{part}/{name}", finite


def _scales(action: Any) -> dict[str, Any]:
    return {} if action is None else {"lr_scale": action.lr_scale, "momentum_scale": action.momentum_scale}
