"""Judges a policy on proxies that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lbw_rl.envs.mixture import ProxyKind
from lbw_rl.envs.proxy_training import ProxyTrainingVectorEnv
from lbw_rl.steering import Stretches

FloatArray = NDArray[np.float64]
Act = Callable[[NDArray[np.float32]], NDArray[np.float32]]

EVALUATION_SEED = 7_000_000_000
"""Past every seed that training uses, so that no task is shared."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a policy did on M fresh proxies; every array has shape (M,), one order for all policies.

    Attributes:
        gains: final held-out gain over the base run, nats per token.
        lr_errors: base learning rate / tuned learning rate.
        diverged: whether the governed run diverged.
    """

    gains: FloatArray
    lr_errors: FloatArray
    diverged: NDArray[np.bool_]

    def summary(self) -> dict[str, float]:
        """Mean gain, its standard error, mean gains by learning-rate error, and the share that diverged."""
        error = np.log10(self.lr_errors)
        groups = {"too_low": error < 0, "well_tuned": error == 0, "too_high": error > 0}
        by_group = {f"gain_{name}": float(self.gains[g].mean()) for name, g in groups.items() if g.any()}
        return {
            "gain": float(self.gains.mean()),
            "standard_error": float(self.gains.std(ddof=1) / np.sqrt(len(self.gains))) if len(self.gains) > 1 else 0.0,
            **by_group,
            "diverged": float(self.diverged.mean()),
        }


class Judge:
    """Runs policies over one episode of each of M fresh proxies, the same for all; the base runs are made once.

    Args:
        proxies: M.
        kinds: of the proxies, as many of each as of the others, give or take one.
        seed: of the first proxy.
        arguments: of `ProxyKind.fleet`, but for `base_run`.
    """

    def __init__(
        self,
        proxies: int = 128,
        *,
        kinds: Sequence[ProxyKind] = (ProxyKind(),),
        seed: int = EVALUATION_SEED,
        **arguments: Any,
    ) -> None:
        sizes = [len(part) for part in np.array_split(np.arange(proxies), len(kinds))]
        self._fleets = [(kind, n) for kind, n in zip(kinds, sizes, strict=True) if n]
        self._seed, self._arguments = seed, arguments
        self._base: FloatArray | None = None

    def __call__(
        self, act: Act, progress: Callable[[int], None] | None = None, stretches: int | None = None
    ) -> Evaluation:
        """How a policy did.

        Args:
            act: observations (n, features) → actions (n, 2).
            progress: told, after every kind, how many of the proxies have ended.
            stretches: parts of a run in each of which one action is held; None: an action for every decision.
        """
        if self._base is None:
            self._base = self._ends(_neutral, None, None).gains
        ends = self._ends(act, progress, stretches)
        return replace(ends, gains=ends.gains - self._base)

    def _ends(self, act: Act, progress: Callable[[int], None] | None, stretches: int | None) -> Evaluation:
        """One episode of every proxy, with gains over the initial loss."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # on busy cores, kernels this small wait longer for a second thread than they run
        try:
            parts: list[Evaluation] = []
            for kind, n in self._fleets:
                env = kind.fleet(n, base_run=False, **self._arguments)
                parts.append(_episodes(act, env, self._seed, stretches))
                if progress is not None:
                    progress(sum(len(part.gains) for part in parts))
            return Evaluation(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Evaluation)))
        finally:
            torch.set_num_threads(threads)


def _episodes(act: Act, env: ProxyTrainingVectorEnv, seed: int, stretches: int | None) -> Evaluation:
    """One episode of every run of `env`, with gains over the initial loss."""
    proxies = env.num_envs
    observations, _ = env.reset(seed=seed)
    result = Evaluation(np.zeros(proxies), np.zeros(proxies), np.zeros(proxies, dtype=bool))
    running = np.ones(proxies, dtype=bool)
    due, actions = Stretches(proxies, stretches), np.zeros((proxies, 2), dtype=np.float32)
    while running.any():
        begins = due(observations)
        actions = np.where(begins[:, None], act(observations), actions)
        observations, _, terminated, truncated, info = env.step(actions)
        finished = (terminated | truncated) & running
        if finished.any():
            final = info["final_info"]
            result.gains[finished] = final["gain"][finished]
            result.lr_errors[finished] = final["task"]["lr_error"][finished]
            result.diverged[finished] = terminated[finished]
            running &= ~finished
    env.close()
    return result


def uniform(seed: int = 0) -> Act:
    """A policy of uniformly random actions."""
    rng = np.random.default_rng(seed)
    return lambda observations: rng.uniform(-1.0, 1.0, (len(observations), 2)).astype(np.float32)


def _neutral(observations: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.zeros((len(observations), 2), dtype=np.float32)
