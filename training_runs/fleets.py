"""Where the fleets of a policy's training live: threads of this process, or processes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gymnasium.vector import VectorEnv

from lbw_rl.envs.mixture import Mixture, ProxyKind
from lbw_rl.training_runs.workers import Backend, ray_cluster


@contextmanager
def fleets(mixture: Mixture, arguments: dict[str, Any], backend: Backend) -> Iterator[Sequence[VectorEnv]]:
    """The environments of a mixture, for as long as the block.

    Args:
        mixture: kinds and numbers.
        arguments: of `ProxyKind.fleet`, the same for all.
        backend: "local" or "ray".

    Raises:
        ValueError: Ray is asked for and not installed.
    """
    if backend == "local":
        yield [kind.fleet(n, **arguments) for kind, n in mixture]
        return
    with ray_cluster() as ray:
        actor = ray.remote(num_cpus=1)(_Host)
        hosts = [actor.remote(kind, n, arguments) for kind, n in mixture]
        yield [RemoteFleet(ray, host, kind, n, arguments) for host, (kind, n) in zip(hosts, mixture, strict=True)]


class _Host:
    """A fleet in a process of its own."""

    def __init__(self, kind: ProxyKind, n: int, arguments: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(1)
        self.environment = kind.fleet(n, **arguments)

    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        return getattr(self.environment, method)(**arguments)


class RemoteFleet(VectorEnv):
    """A fleet that lives in a Ray actor; spaces and metadata are those of an empty twin here.

    Its steps wait for the actor; `FleetVecEnv` lets several wait at a time.
    """

    def __init__(self, ray: Any, host: Any, kind: ProxyKind, n: int, arguments: dict[str, Any]) -> None:
        self._ray, self._host = ray, host
        one = kind.fleet(1, **arguments)
        self.num_envs, self.metadata = n, one.metadata
        self.single_observation_space, self.single_action_space = one.single_observation_space, one.single_action_space

    def reset(self, **arguments: Any) -> Any:
        """As the environment's."""
        return self._ray.get(self._host.call.remote("reset", arguments))

    def step(self, actions: Any) -> Any:
        """As the environment's."""
        return self._ray.get(self._host.call.remote("step", {"actions": actions}))

    def close(self, **_: Any) -> None:
        """Ends the actor."""
        self._ray.kill(self._host)
