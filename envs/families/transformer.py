"""Llama- and Qwen2-style transformers: RMSNorm, rotary positions, SwiGLU, causal attention, tied embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lbw_rl.envs.families.family import embed, linear, token_losses
from lbw_rl.envs.proxy_data import BatchShape, token_data
from lbw_rl.envs.tasks import Tasks

ATTENTION, FFN = ("q", "k", "v", "out"), ("gate", "up", "down")

Linear = Callable[[Tensor, str], Tensor]
"""x (n, rows, in), name of a projection → (n, rows, out)."""


@dataclass(frozen=True, slots=True)
class FleetShape:
    """The transformer that all models of a fleet share; its defaults are the default proxy.

    `init_std` and `rope_theta` default to those of transformers' `LlamaConfig` and `Qwen2Config`, so that a proxy
    starts from weights of the same size as a large run and its update/weight ratio means the same.

    Attributes:
        qkv_bias: biases on q, k and v, which make a Llama a Qwen2 (Yang et al. 2407.10671, §2.2); from 0, as there.
    """

    vocab: int = 64
    width: int = 32
    layers: int = 1
    heads: int = 2
    ffn: int = 64
    init_std: float = 0.02
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} must be a multiple of 2·heads={2 * self.heads} (rotary pairs)")

    @property
    def name(self) -> str:
        """ "llama" or "qwen2"."""
        return "qwen2" if self.qkv_bias else "llama"

    @property
    def tuned_lr(self) -> float:
        """Best constant-error learning rate of the default shape."""
        return 1e-2

    def projections(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and shape (out, in) of every matrix but the embedding."""
        d, f = self.width, self.ffn
        for i in range(self.layers):
            for name in ATTENTION:
                yield f"{i}.{name}", (d, d)
            for name in FFN:
                yield f"{i}.{name}", (d, f) if name == "down" else (f, d)

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter of one model, matrices first."""
        d = self.width
        yield "embed", (self.vocab, d)
        yield from self.projections()
        for i in range(self.layers):
            yield f"{i}.attention_norm", (d,)
            yield f"{i}.ffn_norm", (d,)
        yield "norm", (d,)
        if self.qkv_bias:
            for i in range(self.layers):
                for name in "qkv":
                    yield f"{i}.{name}_bias", (d,)

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Matrices from normal(0, `init_std`), norms at 1, biases at 0."""
        projections = sum(a * b for _, (a, b) in self.projections())
        matrices = rng.standard_normal(self.vocab * self.width + projections, dtype=np.float32)
        norms = np.ones((2 * self.layers + 1) * self.width, dtype=np.float32)
        biases = np.zeros(3 * self.layers * self.width if self.qkv_bias else 0, dtype=np.float32)
        return np.concatenate([matrices * np.float32(self.init_std), norms, biases])

    def data(self, task: Tasks, steps: int, batch: BatchShape, text: Path | None) -> tuple[Tensor, Tensor]:
        """Tokens of a single task; see `Family.data`."""
        return token_data(task, steps, batch, self.vocab, text)

    def losses(self, weights: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        """Mean cross-entropy of each model in nats per token, shape (n,); see `Family.losses`."""

        def project(x: Tensor, name: str) -> Tensor:
            bias = weights.get(f"{name}_bias")
            if bias is None:
                return linear(x, weights[name])
            return torch.baddbmm(bias[:, None, :], x, weights[name].transpose(1, 2))

        return token_losses(self.logits(weights, batch[:, :, :-1], project), batch[:, :, 1:])

    def logits(self, weights: Mapping[str, Tensor], tokens: Tensor, project: Linear) -> Tensor:
        """Next-token logits.

        Args:
            weights: embedding and norms, name → shape (n, …).
            tokens: int64, shape (n, sequences, length).
            project: applies the projections.

        Returns:
            Shape (n, sequences · length, vocab).
        """
        n, sequences, length = tokens.shape
        x = embed(tokens, weights["embed"])
        for i in range(self.layers):
            h = self._norm(x, weights[f"{i}.attention_norm"])
            q, k, v = (project(h, f"{i}.{name}").view(n * sequences, length, self.width) for name in "qkv")
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self._rotate(q), self._rotate(k), v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + project(y.transpose(1, 2).reshape(n, sequences * length, -1), f"{i}.out")
            h = self._norm(x, weights[f"{i}.ffn_norm"])
            x = x + project(F.silu(project(h, f"{i}.gate")) * project(h, f"{i}.up"), f"{i}.down")
        return linear(self._norm(x, weights["norm"]), weights["embed"])

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), eps=self.norm_eps) * weight[:, None, :]

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary positions for x (…, length, width), neighbouring channels as complex pairs (Su et al. 2104.09864)."""
        pairs = torch.view_as_complex(x.reshape(len(x), -1, 2))
        return torch.view_as_real(pairs * _rotary(self, x.shape[-2])).view_as(x)


@cache
def _rotary(shape: FleetShape, length: int) -> Tensor:
    """Rotary factors, laid out as activations are, all heads side by side: a whole sequence is one run of memory."""
    width = shape.width // shape.heads
    frequency = shape.rope_theta ** (-torch.arange(0, width, 2) / width)
    angle = torch.outer(torch.arange(length), frequency).repeat(1, shape.heads)
    return torch.polar(torch.ones_like(angle), angle).flatten()
