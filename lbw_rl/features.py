"""Feature schema v3: what a learned policy sees of the telemetry.

Dimensionless, clipped, and free of anything that identifies the task's size (no absolute learning rate,
parameter count or vocabulary by itself), so that a policy trained on proxies reads a large run in the same terms. Free of the
clock, too: what a policy decides must not depend on how fast a machine is, nor differ when a run is repeated.
Works on a batch of runs at once: every signal is an array of shape (n,), n = 1 under a `Governor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FEATURE_SCHEMA = 3
FEATURE_LIMIT = 3.0
"""Every feature is clipped to ±this; 0 is the centre of its range and stands for "not measured"."""

_FAST, _SLOW = 0.3, 0.1  # weights of the newest decision in the two exponential means (half-lives ~2 and ~7)
_LN_2, _LN_10, _LN_NOISE, _LN_AGREEMENT = np.log([2, 10, 0.02, 0.01])
_LN_DISPLACEMENT = np.log(0.7)  # update_ratio · sqrt(total steps) of a well-tuned run (docs/LOG.md, 2026-11-22)
_UNKNOWN_HORIZON = 1000.0
_HUGE = 1e100  # sums and differences of anything smaller stay finite; what is larger was not measured


def _log_ratio(a: Array, b: Array) -> Array:
    return np.log(a) - np.log(b)


_DEFINITIONS: dict[str, tuple[str, Callable[[dict[str, Array]], Array]]] = {
    "progress": ("2·progress − 1", lambda s: 2 * s["progress"] - 1),
    "lr_scale": ("ln(executed lr_scale) / ln 10", lambda s: np.log(s["lr_scale"]) / _LN_10),
    "momentum_scale": (
        "ln(executed momentum_scale) / ln 2",
        lambda s: np.log(s["momentum_scale"]) / _LN_2,
    ),
    "schedule": (
        "2·(scheduled lr / its maximum so far) − 1",
        lambda s: 2 * s["learning_rate"] / s["_lr_max"] - 1,
    ),
    "displacement": (
        "ln(update_ratio · sqrt(total steps) / 0.7): the run's random-walk displacement relative to its weights",
        lambda s: np.log(s["update_ratio"] * s["_sqrt_horizon"]) - _LN_DISPLACEMENT,
    ),
    "update_ratio_trend": (
        "ln(update_ratio / its slow mean)",
        lambda s: _log_ratio(s["update_ratio"], s["_update_ratio"]),
    ),
    "weight_growth": (
        "2·ln(weight_rms / its first value)",
        lambda s: 2 * _log_ratio(s["weight_rms"], s["_weight_first"]),
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
    "loss_noise": (
        "ln(mean absolute deviation / 0.02 / slow mean loss): how much the loss of one batch tells",
        lambda s: np.log(s["_loss_deviation"] / s["_loss_slow"]) - _LN_NOISE,
    ),
    "grad_norm_jump": (
        "ln(grad_norm / its slow mean)",
        lambda s: _log_ratio(s["grad_norm"], s["_grad_norm"]),
    ),
    "grad_norm_level": (
        "ln(slow mean grad_norm / first grad_norm)",
        lambda s: _log_ratio(s["_grad_norm"], s["_grad_norm_first"]),
    ),
    "steepness": (
        "ln(slow mean grad_norm · first weight_rms · sqrt(weights) / 10): the loss change in nats, to first order, of an update "
        "as large as the weights",
        lambda s: np.log(s["_grad_norm"] * s["_weight_first"] * s["_root_weights"]) - _LN_10,
    ),
    "grad_entropy": ("4·grad_entropy − 2", lambda s: 4 * s["grad_entropy"] - 2),
    "grad_entropy_element": ("4·grad_entropy_element − 3", lambda s: 4 * s["grad_entropy_element"] - 3),
    "grad_agreement": (
        "ln((1 − slow mean grad_entropy_direction + 0.001) / 0.01) / 2: 0 where a gradient agrees with the last ten as in a "
        "usual run of small batches",
        lambda s: (np.log(1 - s["_direction"] + 1e-3) - _LN_AGREEMENT) / 2,
    ),
    "grad_cosine": ("2·grad_cosine", lambda s: 2 * s["grad_cosine"]),
    "surprise": ("ln(surprise) / 2", lambda s: np.log(s["surprise"]) / 2),
    "nonfinite": ("nonfinite", lambda s: s["nonfinite"]),
    "gpu_utilization": ("2·gpu_utilization − 1", lambda s: 2 * s["gpu_utilization"] - 1),
    "gpu_memory": ("2·gpu_memory − 1", lambda s: 2 * s["gpu_memory"] - 1),
    "gpu_power": ("2·gpu_power − 1", lambda s: 2 * s["gpu_power"] - 1),
}

FEATURES: dict[str, str] = {name: definition for name, (definition, _) in _DEFINITIONS.items()}
"""Feature name → definition, in the order of the vector (schema v3)."""

_PROGRESS = list(FEATURES).index("progress")


def progress_seen(features: NDArray[Any]) -> NDArray[Any]:
    """The done share of each run as its features, shape (…, len(FEATURES)), tell it; 0.5 where it is not known."""
    share: NDArray[Any] = (features[..., _PROGRESS] + 1) / 2
    return share


_SIGNALS_READ = (
    "progress", "lr_scale", "momentum_scale", "learning_rate", "update_ratio", "loss", "grad_norm", "grad_entropy",
    "grad_cosine", "surprise", "nonfinite", "gpu_utilization", "gpu_memory", "gpu_power", "weight_rms", "grad_entropy_element",
    "grad_entropy_direction",
)  # fmt: skip

_FIRST = {"_loss_first": "loss", "_weight_first": "weight_rms", "_grad_norm_first": "grad_norm"}
_SLOW_MEANS = ("_loss_slow", "_loss_deviation", "_update_ratio", "_grad_norm", "_direction")
_MEMORY = ("_lr_max", *_FIRST, "_loss_fast", *_SLOW_MEANS)


class FeatureTracker:
    """Turns the telemetry of `n` runs into feature vectors, one decision at a time.

    Keeps, per run, exponential means of loss, gradient norm, update ratio and gradient direction. A non-finite
    value never enters them; until a mean exists its features read 0.

    Args:
        n: number of runs.
        total_steps: their horizons, shape (n,), or one for all; None where it is not known.
        weights: elements of the trainable matrices of each run's model; None where it is not known.
    """

    def __init__(self, n: int, total_steps: Array | float | None, weights: int | None = None) -> None:
        self.n = n
        horizon = _UNKNOWN_HORIZON if total_steps is None else total_steps
        self._sqrt_horizon = np.sqrt(np.broadcast_to(np.asarray(horizon, dtype=np.float64), (n,)).copy())
        self._root_weights = np.full(n, np.nan if weights is None else np.sqrt(weights))
        self._memory = np.full((len(_MEMORY), n), np.nan)
        self._raw = np.zeros((n, len(_DEFINITIONS)))

    @property
    def clipped(self) -> Array:
        """Share of the features of the last decision that lay outside ±`FEATURE_LIMIT`, shape (n,)."""
        return (np.abs(self._raw) > FEATURE_LIMIT).mean(axis=1)

    def reset(self, mask: NDArray[np.bool_], total_steps: Array | float | None = None) -> None:
        """Forgets the runs where `mask`, shape (n,), is true; `total_steps` gives their new horizons."""
        self._memory[:, mask] = np.nan
        self._raw[mask] = 0.0
        if total_steps is not None:
            self._sqrt_horizon[mask] = np.sqrt(
                np.broadcast_to(np.asarray(total_steps, dtype=np.float64), (self.n,))[mask]
            )

    def __call__(self, signals: Mapping[str, Array | float]) -> Array:
        """Takes in one decision's signals.

        Args:
            signals: signal name → array of shape (n,), or one number for all runs; a signal that is absent
                counts as not measured.

        Returns:
            Features of shape (n, len(FEATURES)), all finite and within ±`FEATURE_LIMIT`.
        """
        read = np.empty((len(_SIGNALS_READ), self.n))
        for row, name in zip(read, _SIGNALS_READ):
            row[:] = signals.get(name, np.nan)
        read[~(np.abs(read) < _HUGE)] = np.nan
        s = dict(zip(_SIGNALS_READ, read))
        memory = dict(zip(_MEMORY, self._memory))  # views: writing to them is remembering
        loss, loss_slow = s["loss"], memory["_loss_slow"]
        deviation = np.abs(loss - np.where(np.isnan(loss_slow), loss, loss_slow)) + 1e-3
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            memory["_lr_max"][:] = np.fmax(memory["_lr_max"], s["learning_rate"])
            for name, signal in _FIRST.items():
                memory[name][:] = np.where(np.isnan(memory[name]), s[signal], memory[name])
            memory["_loss_fast"][:] = _blend(memory["_loss_fast"], loss, _FAST)
            # Jumps are measured against the past alone: the newest value enters its own slow mean afterwards.
            s.update(memory, _sqrt_horizon=self._sqrt_horizon, _root_weights=self._root_weights)
            for i, (_, feature) in enumerate(_DEFINITIONS.values()):
                self._raw[:, i] = feature(s)
        newest = np.array([loss, deviation, s["update_ratio"], s["grad_norm"], s["grad_entropy_direction"]])
        slow = self._memory[-len(_SLOW_MEANS) :]
        slow[:] = _blend(slow, newest, _SLOW)
        self._raw[np.isnan(self._raw)] = 0.0
        return self._raw.clip(-FEATURE_LIMIT, FEATURE_LIMIT)

    def state_dict(self) -> dict[str, Any]:
        """The means, as JSON data (NaN as None)."""
        return {k: [None if np.isnan(x) else float(x) for x in v] for k, v in zip(_MEMORY, self._memory)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`'s means."""
        for name, row in zip(_MEMORY, self._memory):
            row[:] = [np.nan if x is None else x for x in state[name]]


def _blend(mean: Array, value: Array, weight: float) -> Array:
    """Exponential mean that starts at its first value and ignores NaN."""
    moved = mean + weight * (value - mean)
    return np.where(np.isnan(moved), np.fmax(mean, value), moved)  # where one is NaN, fmax takes the other
