"""Gymnasium vector environments as one stable-baselines3 `VecEnv`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env.base_vec_env import VecEnv


class FleetVecEnv(VecEnv):
    """Presents same-step vector environments, side by side, to stable-baselines3.

    Both sides restart a finished sub-environment within the step that finishes it, so nothing is delayed or
    dropped: the last observation goes to `infos[i]["terminal_observation"]`, and the return, length and final
    gain to `infos[i]["episode"]`.

    stable-baselines3 adds γ·V(terminal observation) to the reward wherever `infos[i]["TimeLimit.truncated"]` is
    set, as for a task that goes on beyond the limit. A training run whose budget is spent does not go on: its
    horizon is observed and its return is complete, so that by default no truncation is reported.

    Args:
        environments: each steps in a thread of its own; torch lets go of the interpreter while it computes.
        bootstrap_truncated: report truncations, for environments whose time limit is not part of the task.

    Raises:
        ValueError: no environment, or one with another autoreset mode.
    """

    def __init__(self, environments: Sequence[VectorEnv], *, bootstrap_truncated: bool = False) -> None:
        if not environments:
            raise ValueError("environments: at least one is needed")
        for e in environments:
            if e.metadata.get("autoreset_mode") is not AutoresetMode.SAME_STEP:
                raise ValueError(
                    f"autoreset_mode={e.metadata.get('autoreset_mode')} of {e}; accepted: AutoresetMode.SAME_STEP"
                )
        self.environments = list(environments)
        self.bootstrap_truncated = bootstrap_truncated
        sizes = [e.num_envs for e in environments]
        super().__init__(sum(sizes), environments[0].single_observation_space, environments[0].single_action_space)
        self._borders = np.cumsum(sizes)[:-1]
        self._pool = ThreadPoolExecutor(len(environments)) if len(environments) > 1 else None
        self._actions: NDArray[np.float32] | None = None
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)

    def _each(self, method: str, arguments: Iterable[dict[str, Any]]) -> list[Any]:
        calls = list(zip(self.environments, arguments, strict=True))
        if self._pool is None:
            return [getattr(e, method)(**kwargs) for e, kwargs in calls]
        return [f.result() for f in [self._pool.submit(getattr(e, method), **kwargs) for e, kwargs in calls]]

    def seed_blocks(self, seed: int, size: int) -> None:
        """As `seed`, with one seed for every `size` neighbours: they meet the same tasks in the same order."""
        self._seeds = [seed + i // size for i in range(self.num_envs)]

    def reset(self) -> NDArray[np.float32]:
        """Starts all environments; `seed` decides how."""
        seeds = [list(part) for part in np.split(np.array(self._seeds, dtype=object), self._borders)]
        results = self._each("reset", ({"seed": part} for part in seeds))
        self._reset_seeds()
        self._returns[:] = 0.0
        self._lengths[:] = 0
        return np.concatenate([observations for observations, _ in results])

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Takes the actions, shape (num_envs, actions)."""
        self._actions = actions

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Executes them."""
        assert self._actions is not None, "step_wait without step_async"
        results = self._each("step", ({"actions": part} for part in np.split(self._actions, self._borders)))
        observations, rewards, terminated, truncated = (np.concatenate([r[i] for r in results]) for i in range(4))
        done = terminated | truncated
        self._returns += rewards
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        first = 0
        for environment, result in zip(self.environments, results, strict=True):
            for i in np.flatnonzero(done[first : first + environment.num_envs]):
                info, k = result[4], first + i
                infos[k] = {
                    "terminal_observation": info["final_obs"][i],
                    "TimeLimit.truncated": bool(truncated[k] and not terminated[k] and self.bootstrap_truncated),
                    "episode": {
                        "r": float(self._returns[k]),
                        "l": int(self._lengths[k]),
                        "diverged": bool(terminated[k]),
                    },
                }
            first += environment.num_envs
        self._returns[done] = 0.0
        self._lengths[done] = 0
        return observations, rewards.astype(np.float32), done, infos

    def close(self) -> None:
        """Closes the environments and ends the threads."""
        for e in self.environments:
            e.close()
        if self._pool is not None:
            self._pool.shutdown()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute of the environment that each index belongs to."""
        owners = [e for e in self.environments for _ in range(e.num_envs)]
        return [getattr(owners[i], attr_name) for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not offered: the runs of a fleet share their settings."""
        raise NotImplementedError(f"{attr_name}: the runs of a fleet share their settings")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Not offered: a fleet has no separate environments."""
        raise NotImplementedError(f"{method_name}: a fleet has no separate environments")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """False throughout."""
        return [False for _ in self._get_indices(indices)]
