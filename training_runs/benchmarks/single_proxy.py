"""One proxy at a time, for comparison with the fleet: as a Gymnasium environment, and as a plain training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from lbw_rl.envs.fleet import FleetShape
from lbw_rl.envs.proxy_runs import BatchShape
from lbw_rl.envs.proxy_training import ProxyTrainingVectorEnv

Observation = NDArray[np.float32]


class SingleProxyEnv(gymnasium.Env[Observation, Observation]):
    """`ProxyTrainingVectorEnv` of one run as an ordinary environment.

    Args:
        **settings: of `ProxyTrainingVectorEnv`.
    """

    def __init__(self, **settings: Any) -> None:
        torch.set_num_threads(1)
        self._vector = ProxyTrainingVectorEnv(1, **settings)
        self.action_space, self.observation_space = (
            self._vector.single_action_space,
            self._vector.single_observation_space,
        )
        self._next: Observation | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict]:
        """Starts an episode; after a finished one, the one that the vector environment has started already."""
        if self._next is None or seed is not None:
            self._next = self._vector.reset(seed=seed)[0][0]
        first, self._next = self._next, None
        return first, {}

    def step(self, action: Observation) -> tuple[Observation, float, bool, bool, dict]:
        """One decision."""
        observations, rewards, terminated, truncated, info = self._vector.step(np.asarray(action)[None])
        observation = observations[0]
        if terminated[0] or truncated[0]:
            self._next, observation = observation, info["final_obs"][0]
        return observation, float(rewards[0]), bool(terminated[0]), bool(truncated[0]), {}


def plain_llama(shape: FleetShape, batch: BatchShape) -> Callable[[], object]:
    """A training step of one transformers Llama of that shape, under torch's AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(shape.vocab, (batch.sequences, batch.length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step
