"""Follows a policy training from inside stable-baselines3."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from lbw_rl.features import FEATURES

Progress = Callable[[dict[str, float]], None]

_STD_FLOOR = 0.1  # a feature that never moved in training must still have a scale
_EPISODES = 200  # newest episodes that the means are taken over


def curve_up_to(curve: Path, decisions: int) -> list[dict[str, Any]]:
    """The lines of a learning curve up to so many decisions; none if there is no file."""
    lines = curve.read_text(encoding="utf-8").splitlines() if curve.exists() else []
    return [line for line in map(json.loads, lines) if line["decisions"] <= decisions]


class TrainingMonitor(BaseCallback):
    """Episode returns, the learning curve, and the statistics of the observations of the newest segment.

    Args:
        curve: JSONL file; gets one line per rollout.
        planned: decisions of PPO.
        progress: called after every rollout with the line, and "eta_seconds".
        before: decisions of the stage before PPO, from which the curve's are counted on.
    """

    def __init__(self, curve: Path, planned: int, progress: Progress | None, before: int = 0) -> None:
        super().__init__()
        self._curve, self._planned, self._progress, self._before = curve, planned, progress, before
        self._returns: deque[float] = deque(maxlen=_EPISODES)
        self._diverged: deque[float] = deque(maxlen=_EPISODES)
        self._count, self._sum, self._square = 0, np.zeros(len(FEATURES)), np.zeros(len(FEATURES))
        self._since, self._done_before = 0.0, 0

    def begin(self, done: int) -> None:
        """Starts the clock, and the curve at the `done` decisions of an earlier attempt."""
        self._since, self._done_before = time.perf_counter(), done
        kept = curve_up_to(self._curve, self._before + done)
        self._curve.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def begin_segment(self) -> None:
        """Forgets the observations of the segment before."""
        self._count = 0
        self._sum[:] = self._square[:] = 0.0

    @property
    def return_mean(self) -> float:
        """Mean return of the newest episodes; NaN before the first."""
        return float(np.mean(self._returns)) if self._returns else float("nan")

    def normaliser(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of the observations of the newest segment, shape (features,) each."""
        mean = self._sum / max(1, self._count)
        variance = self._square / max(1, self._count) - mean**2
        return mean, np.maximum(_STD_FLOOR, np.sqrt(np.maximum(0.0, variance)))

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self._returns.append(info["episode"]["r"])
                self._diverged.append(float(info["episode"]["diverged"]))
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, PPO)
        buffer = self.model.rollout_buffer
        observations = buffer.observations.reshape(-1, len(FEATURES)).astype(np.float64)
        self._count += len(observations)
        self._sum += observations.sum(0)
        self._square += (observations**2).sum(0)
        std = self.model.policy.log_std.detach().exp()
        record = {
            "decisions": float(self._before + self.num_timesteps),
            "return_mean": self.return_mean,
            "clip_fraction": float((np.abs(buffer.actions) > 1.0).mean()),
            "entropy": float(torch.distributions.Normal(torch.zeros(len(std)), std).entropy().sum()),
            "diverged": float(np.mean(self._diverged)) if self._diverged else float("nan"),
        }
        line = {k: v if np.isfinite(v) else None for k, v in record.items()}
        with self._curve.open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(line) + "\n")
        if self._progress is not None:
            seconds = time.perf_counter() - self._since
            left = max(0, self._planned - self.num_timesteps) / max(1, self.num_timesteps - self._done_before)
            self._progress(record | {"eta_seconds": seconds * left})

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training reports and returns, as plain data."""
        return {
            "returns": list(self._returns),
            "diverged": list(self._diverged),
            "count": self._count,
            "sum": self._sum.tolist(),
            "square": self._square.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self._returns.extend(state["returns"])
        self._diverged.extend(state["diverged"])
        self._count = state["count"]
        self._sum, self._square = np.array(state["sum"]), np.array(state["square"])
