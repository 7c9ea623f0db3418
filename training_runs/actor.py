"""A policy network as plain arrays: what PPO leaves behind and a frozen policy is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy

FloatArray = NDArray[np.float64]
Layer = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Actor:
    """The mean action of a tanh network.

    Attributes:
        layers: (weight of shape (out, in), bias of shape (out,)) of each layer; tanh between them.
    """

    layers: list[Layer]

    def __call__(self, observations: NDArray[np.floating]) -> NDArray[np.float32]:
        """Mean actions, shape (n, actions), clipped to [-1, 1], of observations of shape (n, features)."""
        x = observations.astype(np.float32)
        for weight, bias in self.layers[:-1]:
            x = np.tanh(x @ weight.T + bias)
        weight, bias = self.layers[-1]
        return np.clip(x @ weight.T + bias, -1.0, 1.0)

    def normalised(self, mean: FloatArray, std: FloatArray) -> Actor:
        """The same function of (observations − mean) / std, shapes (features,): only the first layer changes."""
        weight, bias = self.layers[0]
        first = (weight * std).astype(np.float32), (bias + weight @ mean).astype(np.float32)
        return Actor([first, *self.layers[1:]])

    def of_raw(self, mean: FloatArray, std: FloatArray) -> Actor:
        """The inverse of `normalised`: an actor of observations, given one of (observation − mean) / std."""
        return self.normalised(-mean / std, 1.0 / std)


def actor_of(policy: ActorCriticPolicy) -> Actor:
    """Copies the actor out of a stable-baselines3 `MlpPolicy` with tanh activations."""
    modules = [*policy.mlp_extractor.policy_net.modules(), policy.action_net]
    linear = [m for m in modules if isinstance(m, torch.nn.Linear)]
    return Actor([(m.weight.detach().numpy().copy(), m.bias.detach().numpy().copy()) for m in linear])
