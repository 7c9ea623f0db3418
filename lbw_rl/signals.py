"""The signal table: every quantity the governor can observe, defined once.

`Telemetry` is one decision window's raw record. Its fields *are* the table: `SIGNALS` is read off their
metadata, and the docs, the policy schema and the dashboards are generated from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

NAN = math.nan


@dataclass(frozen=True, slots=True)
class Signal:
    """One row of the table: what a telemetry field means.

    `low` and `high` bound the values that a healthy source can report (NaN, "not measured", is always
    allowed); `source` says who measures it.
    """

    name: str
    unit: str
    low: float
    high: float
    source: str
    definition: str


def _signal(unit: str, low: float, high: float, source: str, definition: str) -> Any:
    return field(default=NAN, metadata={"signal": (unit, low, high, source, definition)})


INF = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """Raw signals of one decision window, in physical units. Missing is NaN, never 0."""

    step: float = _signal("steps", 0, INF, "governor", "optimizer steps attempted before this decision")
    progress: float = _signal("1", 0, 1, "governor", "step / planned optimizer steps; NaN if the horizon is unknown")
    learning_rate: float = _signal(
        "1",
        0,
        INF,
        "optimizer",
        "scheduled learning rate of the first parameter group that trains, before the governor's scale",
    )
    previous_learning_rate: float = _signal(
        "1",
        0,
        INF,
        "optimizer",
        "scheduled learning rate of the previous step, which lr_scale and update_ratio tell of",
    )
    momentum: float = _signal(
        "1",
        0,
        1,
        "optimizer",
        "scheduled β1 or momentum of that parameter group, before the governor's scale; 0 without any, NaN where it is not known",
    )
    lr_scale: float = _signal("1", 0, INF, "governor", "learning-rate scale executed at the previous step")
    momentum_scale: float = _signal(
        "1", 0, INF, "governor", "momentum scale (of the averaging horizon) executed at the previous step"
    )
    loss: float = _signal("nats/token", -INF, INF, "model", "training loss, mean over the micro-batches of the window")
    nonfinite: float = _signal(
        "1", 0, 1, "gradient", "1 if the loss or the gradient norm of this step is NaN or infinite, else 0"
    )
    grad_norm: float = _signal("1", 0, INF, "gradient", "global L2 norm of the gradient before clipping")
    grad_entropy: float = _signal(
        "1",
        0,
        1,
        "gradient",
        "entropy of a histogram of log2|g/rms(g)| over a fixed sample, divided by log(bins)",
    )
    grad_entropy_softmax: float = _signal(
        "1",
        0,
        1,
        "gradient",
        "H(softmax(|g|)) / log n over the sample, EntroPIC's own estimator: between 0.9995 and 1 in every run that no burst hits",
    )
    grad_entropy_element: float = _signal(
        "1",
        0,
        1,
        "gradient",
        "entropy of the sampled elements' shares of the gradient's energy g², divided by log n: over how many it is spread",
    )
    grad_entropy_tensor: float = _signal(
        "1",
        0,
        1,
        "gradient",
        "entropy of the weight matrices' shares of the gradient's energy, divided by log(matrices)",
    )
    grad_entropy_direction: float = _signal(
        "1",
        0,
        1,
        "gradient",
        "binary entropy (bits) of the share of the energy in elements that keep the sign of the mean gradient of about ten decisions: 1 a coin toss, 0 straight on",
    )
    grad_cosine: float = _signal(
        "1", -1, 1, "gradient", "cosine of this and the previous decision's gradient on a fixed sample"
    )
    update_ratio: float = _signal(
        "1",
        0,
        INF,
        "optimizer",
        "‖Δw‖/‖w‖ of the last executed update on a fixed sample of the weight matrices (Frobenius, all matrices together)",
    )
    surprise: float = _signal(
        "1",
        0,
        INF,
        "optimizer",
        "RMS of g²/max(v, ε²) on a fixed sample, v the bias-corrected second moment that this step is about to use (RMS_t of Wortsman et al. 2304.13013); NaN without v",
    )
    weight_rms: float = _signal("1", 0, INF, "optimizer", "root mean square of the sampled weights")
    sgd_rate: float = _signal(
        "1",
        -INF,
        INF,
        "optimizer",
        "‖p‖²/−(p·ηg) on a fixed sample, p the last step of Adam or AdamW (decoupled decay left out), g its own gradient, η its executed rate: SGD's rate in units of η by SWATS (Keskar & Socher 1712.07628); NaN where p and g are not of one step, and for a step handed over to SGD",
    )
    loss_scale: float = _signal(
        "1",
        0,
        INF,
        "optimizer",
        "GradScaler's factor, where one is known; it falls when steps were skipped for infinities",
    )
    collective_seconds: float = _signal(
        "s", 0, INF, "clock", "time that the ranks took to join the numbers of this decision, slow ranks waited for"
    )
    step_seconds: float = _signal("s", 0, INF, "clock", "wall time of one optimizer step, mean over the window")
    tokens_per_second: float = _signal(
        "tokens/s", 0, INF, "clock", "training tokens a second over the window, on this rank"
    )
    gpu_utilization: float = _signal("1", 0, 1, "device", "share of time that the accelerator ran a kernel (NVML)")
    gpu_memory: float = _signal("1", 0, 1, "device", "share of the accelerator's memory in use (NVML)")
    gpu_power: float = _signal("1", 0, INF, "device", "power draw over its enforced limit (NVML)")
    gpu_temperature: float = _signal("°C", -50, 200, "device", "temperature of the accelerator (NVML)")
    gpu_clock: float = _signal(
        "1", 0, 2, "device", "clock of the accelerator's multiprocessors over its maximum (NVML)"
    )
    gpu_throttled: float = _signal(
        "1", 0, 1, "device", "1 if the driver holds the accelerator's clocks down for heat or power (NVML), else 0"
    )
    cpu_utilization: float = _signal("1", 0, 1, "device", "share of all CPU time in use (psutil)")
    host_memory: float = _signal("1", 0, 1, "device", "share of the host's memory in use (psutil)")
    group_grad_entropy: tuple[float, ...] = ()
    """No signal of the run but one number per parameter group, in the optimizer's order, for controllers that ask for it
    (`Controller.group_entropy`); NaN for a group that is not measured, () where nobody asked."""

    def as_dict(self) -> dict[str, float]:
        """Signal name → value, in table order."""
        return {name: getattr(self, name) for name in SIGNALS}

    def as_record(self) -> dict[str, Any]:
        """`as_dict`, and what is known of each parameter group, as a ledger keeps it."""
        groups = {"group_grad_entropy": list(self.group_grad_entropy)} if self.group_grad_entropy else {}
        return {**self.as_dict(), **groups}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Telemetry:
        """Inverse of `as_dict` and `as_record`; `None` (JSON has no NaN) reads as missing, unknown names are refused.

        Raises:
            ValueError: a name that is not in `SIGNALS`, or a value that is no number.
        """
        values = dict(values)
        groups = values.pop("group_grad_entropy", ())
        if not isinstance(groups, list | tuple) or not all(v is None or isinstance(v, Real) for v in groups):
            raise ValueError(f"telemetry: group_grad_entropy is {groups!r}; accepted: a list of numbers and None")
        unknown = sorted(set(values) - set(SIGNALS))
        if unknown:
            raise ValueError(f"telemetry: unknown signal {unknown[0]!r}; known: {', '.join(SIGNALS)}")
        for name, value in values.items():
            if not (value is None or isinstance(value, Real)):
                raise ValueError(f"telemetry: {name} is {value!r}; accepted: a number, or None for not measured")
        known = {k: NAN if v is None else float(v) for k, v in values.items()}
        return cls(**known, group_grad_entropy=tuple(NAN if v is None else float(v) for v in groups))


SIGNALS: dict[str, Signal] = {
    f.name: Signal(f.name, *f.metadata["signal"]) for f in fields(Telemetry) if "signal" in f.metadata
}
"""Name → row of the signal table, in the order of `Telemetry`'s fields."""
