"""Feature schema v1: what a learned policy sees of the telemetry.

Dimensionless, clipped, and free of anything that identifies the task's size (no absolute learning rate,
parameter count or vocabulary), so that a policy trained on proxies reads a large run in the same terms.
Works on a batch of runs at once: every signal is an array of shape (n,), n = 1 under a `Governor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FEATURE_SCHEMA = 1
FEATURE_LIMIT = 3.0
"""Every feature is clipped to ±this; 0 is the centre of its range and stands for "not measured"."""

_FAST, _SLOW = 0.3, 0.1  # weights of the newest decision in the two exponential means (half-lives ~2 and ~7)
_DISPLACEMENT = 0.7  # update_ratio · sqrt(total steps) of a well-tuned run (docs/LOG.md, 2026-11-22)
_UNKNOWN_HORIZON = 1000.0


def _log_ratio(a: Array, b: Array | float) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(a) - np.log(b)


_DEFINITIONS: dict[str, tuple[str, Callable[[dict[str, Array]], Array]]] = {
    "progress": ("2·progress − 1", lambda s: 2 * s["progress"] - 1),
    "lr_scale": ("ln(executed lr_scale) / ln 10", lambda s: np.log(s["lr_scale"]) / np.log(10)),
    "momentum_scale": (
        "ln(executed momentum_scale) / ln 2",
        lambda s: np.log(s["momentum_scale"]) / np.log(2),
    ),
    "schedule": (
        "2·(scheduled lr / its maximum so far) − 1",
        lambda s: 2 * s["learning_rate"] / s["_lr_max"] - 1,
    ),
    "displacement": (
        "ln(update_ratio · sqrt(total steps) / 0.7): the run's random-walk displacement relative to its weights",
        lambda s: _log_ratio(s["update_ratio"] * s["_sqrt_horizon"], _DISPLACEMENT),
    ),
    "update_ratio_trend": (
        "ln(update_ratio / its slow mean)",
        lambda s: _log_ratio(s["update_ratio"], s["_update_ratio"]),
    ),
    "loss_level": (
        "2·ln(fast mean loss / first loss) + 1",
        lambda s: 2 * _log_ratio(s["_loss_fast"], s["_loss_first"]) + 1,
    ),
    "loss_trend": (
        "(fast − slow mean loss) / mean absolute deviation",
        lambda s: (s["_loss_fast"] - s["_loss_slow"]) / s["_loss_deviation"],
    ),
    "loss_jump": (
        "(loss − slow mean) / mean absolute deviation / 2",
        lambda s: (s["loss"] - s["_loss_slow"]) / s["_loss_deviation"] / 2,
    ),
    "grad_norm_jump": (
        "ln(grad_norm / its slow mean)",
        lambda s: _log_ratio(s["grad_norm"], s["_grad_norm"]),
    ),
    "grad_entropy": ("4·grad_entropy − 2", lambda s: 4 * s["grad_entropy"] - 2),
    "grad_cosine": ("2·grad_cosine", lambda s: 2 * s["grad_cosine"]),
    "surprise": ("ln(surprise) / 2", lambda s: _log_ratio(s["surprise"], 1.0) / 2),
    "nonfinite": ("nonfinite", lambda s: s["nonfinite"]),
    "throughput": (
        "2·ln(tokens_per_second / its slow mean)",
        lambda s: 2 * _log_ratio(s["tokens_per_second"], s["_tokens_per_second"]),
    ),
    "gpu_utilization": ("2·gpu_utilization − 1", lambda s: 2 * s["gpu_utilization"] - 1),
    "gpu_memory": ("2·gpu_memory − 1", lambda s: 2 * s["gpu_memory"] - 1),
    "gpu_power": ("2·gpu_power − 1", lambda s: 2 * s["gpu_power"] - 1),
}

FEATURES: dict[str, str] = {name: definition for name, (definition, _) in _DEFINITIONS.items()}
"""Feature name → definition, in the order of the vector (schema v1)."""

_SLOW_MEANS = ("update_ratio", "grad_norm", "tokens_per_second")


class FeatureTracker:
    """Turns the telemetry of `n` runs into feature vectors, one decision at a time.

    Keeps, per run, exponential means of loss, gradient norm, update ratio and throughput. A non-finite
    value never enters them; until a mean exists its features read 0.
    """

    def __init__(self, n: int, total_steps: Array | float | None) -> None:
        self.n = n
        horizon = _UNKNOWN_HORIZON if total_steps is None else total_steps
        self._sqrt_horizon = np.sqrt(np.broadcast_to(np.asarray(horizon, dtype=np.float64), (n,)).copy())
        self._state = {
            key: np.full(n, np.nan)
            for key in (
                "_lr_max",
                "_loss_first",
                "_loss_fast",
                "_loss_slow",
                "_loss_deviation",
                *(f"_{m}" for m in _SLOW_MEANS),
            )
        }
        self.clipped = np.zeros(n)
        """Share of the features of the last decision that lay outside ±`FEATURE_LIMIT`, shape (n,)."""

    def reset(self, mask: NDArray[np.bool_], total_steps: Array | float | None = None) -> None:
        """Forgets the runs where `mask`, shape (n,), is true; `total_steps` gives their new horizons."""
        for values in self._state.values():
            values[mask] = np.nan
        if total_steps is not None:
            self._sqrt_horizon[mask] = np.sqrt(
                np.broadcast_to(np.asarray(total_steps, dtype=np.float64), (self.n,))[mask]
            )

    def __call__(self, signals: Mapping[str, Array]) -> Array:
        """Takes in one decision's signals.

        Args:
            signals: signal name → array of shape (n,); a signal that is absent counts as not measured.

        Returns:
            Features of shape (n, len(FEATURES)), all finite and within ±`FEATURE_LIMIT`.
        """
        missing = np.full(self.n, np.nan)
        s: dict[str, Array] = dict.fromkeys(_SIGNALS_READ, missing)
        s.update({k: np.where(np.isfinite(v), v, np.nan) for k, v in signals.items() if k in _SIGNALS_READ})
        self._update_peaks(s)
        # Jumps are measured against the past alone: the newest value enters its own mean afterwards.
        s.update(self._state, _sqrt_horizon=self._sqrt_horizon)
        loss_slow = np.where(np.isnan(s["_loss_slow"]), s["loss"], s["_loss_slow"])
        self._state["_loss_fast"] = s["_loss_fast"] = _blend(self._state["_loss_fast"], s["loss"], _FAST)
        with np.errstate(divide="ignore", invalid="ignore"):
            raw = np.stack([fn(s) for _, fn in _DEFINITIONS.values()], axis=1)
        self._state["_loss_deviation"] = _blend(
            self._state["_loss_deviation"], np.abs(s["loss"] - loss_slow) + 1e-3, _SLOW
        )
        self._state["_loss_slow"] = _blend(self._state["_loss_slow"], s["loss"], _SLOW)
        for m in _SLOW_MEANS:
            self._state[f"_{m}"] = _blend(self._state[f"_{m}"], s[m], _SLOW)
        raw = np.where(np.isnan(raw), 0.0, raw)
        self.clipped = (np.abs(raw) > FEATURE_LIMIT).mean(axis=1)
        return np.clip(raw, -FEATURE_LIMIT, FEATURE_LIMIT)

    def _update_peaks(self, s: Mapping[str, Array]) -> None:
        self._state["_lr_max"] = np.fmax(self._state["_lr_max"], s["learning_rate"])
        first = self._state["_loss_first"]
        self._state["_loss_first"] = np.where(np.isnan(first), s["loss"], first)

    def state_dict(self) -> dict[str, Any]:
        """The means, as JSON data (NaN as None)."""
        return {k: [None if np.isnan(x) else float(x) for x in v] for k, v in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`'s means."""
        self._state = {k: np.array([np.nan if x is None else x for x in v], dtype=np.float64) for k, v in state.items()}


_SIGNALS_READ = (
    "progress", "lr_scale", "momentum_scale", "learning_rate", "update_ratio", "loss", "grad_norm", "grad_entropy",
    "grad_cosine", "surprise", "nonfinite", "tokens_per_second", "gpu_utilization", "gpu_memory", "gpu_power",
)  # fmt: skip


def _blend(mean: Array, value: Array, weight: float) -> Array:
    """Exponential mean that starts at its first value and ignores NaN."""
    moved = mean + weight * (value - mean)
    return np.where(np.isnan(value), mean, np.where(np.isnan(mean), value, moved))
