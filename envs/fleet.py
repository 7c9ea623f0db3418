"""N small transformer language models trained as one program.

The models have the Llama architecture (RMSNorm, rotary positions, SwiGLU, causal attention, tied
embedding) with a leading model axis on every tensor, so that one `bmm` serves the whole fleet. All
parameters live in one flat buffer (and all gradients in another), which makes AdamW a dozen
whole-fleet kernels with a learning rate and betas per model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]

_ALIGNMENT = 64  # floats; every model starts on a SIMD boundary, so equal models take equal code paths


@dataclass(frozen=True, slots=True)
class FleetShape:
    """The architecture that all models of a fleet share.

    `init_std` and `rope_theta` default to those of transformers' `LlamaConfig`, so that a proxy starts
    from weights of the same size as a large run and its update/weight ratio means the same.
    """

    vocab: int = 64
    width: int = 32
    layers: int = 1
    heads: int = 2
    ffn: int = 64
    init_std: float = 0.02
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} must be a multiple of 2·heads={2 * self.heads} (rotary pairs)")

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape (out, in) of every parameter of one model, matrices first."""
        d, f = self.width, self.ffn
        yield "embed", (self.vocab, d)
        for i in range(self.layers):
            for name in ("q", "k", "v", "out"):
                yield f"{i}.{name}", (d, d)
            yield f"{i}.gate", (f, d)
            yield f"{i}.up", (f, d)
            yield f"{i}.down", (d, f)
        for i in range(self.layers):
            yield f"{i}.attention_norm", (d,)
            yield f"{i}.ffn_norm", (d,)
        yield "norm", (d,)


class AdamWState:
    """First and second moments and step counts of a fleet, shapes (n, p), (n, p) and (n,)."""

    def __init__(self, n: int, p: int) -> None:
        self.mean = torch.zeros(n, p)
        self.square = torch.zeros(n, p)
        self.steps = np.zeros(n, dtype=np.int64)

    def reset(self, rows: Sequence[int]) -> None:
        """Zeroes the state of the models in `rows`."""
        index = torch.as_tensor(rows, dtype=torch.long)
        self.mean[index] = 0.0
        self.square[index] = 0.0
        self.steps[rows] = 0


class Fleet:
    """`n` models of one shape, each with its own weights, data and AdamW hyper-parameters.

    Attributes:
        weights: all parameters, shape (n, p); the parameters of the program are views into it.
        grads: their gradients after `backward`, shape (n, p).
        matrices: number of leading columns of `weights` that belong to weight matrices.
        size: number of leading columns that hold parameters at all (the rest is padding, always 0).
    """

    def __init__(self, n: int, shape: FleetShape | None = None) -> None:
        self.n = n
        self.shape = shape or FleetShape()
        layout = dict(self.shape.parameters())
        self.matrices = sum(prod(s) for s in layout.values() if len(s) == 2)
        self.size = sum(prod(s) for s in layout.values())
        columns = -(-self.size // _ALIGNMENT) * _ALIGNMENT
        self.weights = torch.zeros(n, columns)
        self.grads = torch.zeros(n, columns)
        self.optimizer = AdamWState(n, columns)
        self._scratch = torch.empty(n, columns)
        self._parameters: dict[str, Tensor] = {}
        self._gradients: list[Tensor] = []
        start = 0
        for name, shape_ in layout.items():
            stop = start + prod(shape_)
            self._parameters[name] = self.weights[:, start:stop].view(n, *shape_).requires_grad_()
            self._gradients.append(self.grads[:, start:stop].view(n, *shape_))
            start = stop
        self._rotary: dict[int, Tensor] = {}

    # -- starting ------------------------------------------------------------------------------------

    def reset(self, rows: Sequence[int], generators: Sequence[np.random.Generator]) -> None:
        """Starts the models in `rows` afresh (weights and optimizer) and leaves the others untouched.

        Args:
            rows: indices of the models.
            generators: one per row; each draws its model's weights, normal(0, `init_std`), norms at 1.
        """
        for row, generator in zip(rows, generators, strict=True):
            draw = generator.standard_normal(self.matrices, dtype=np.float32) * np.float32(self.shape.init_std)
            self.weights.data[row, : self.matrices] = torch.from_numpy(draw)
            self.weights.data[row, self.matrices : self.size] = 1.0
        self.optimizer.reset(rows)

    def copy(self, rows: Sequence[int]) -> Fleet:
        """A separate fleet that holds the models in `rows`, optimizer state included."""
        index = torch.as_tensor(rows, dtype=torch.long)
        other = Fleet(len(rows), self.shape)
        for mine, theirs in zip(self._buffers(), other._buffers(), strict=True):
            theirs.copy_(mine[index])
        other.optimizer.steps[:] = self.optimizer.steps[rows]
        return other

    def paste_grads(self, rows: Sequence[int], other: Fleet) -> None:
        """Takes the gradients of `other`'s models as those of the models in `rows`."""
        self.grads[torch.as_tensor(rows, dtype=torch.long)] = other.grads

    def _buffers(self) -> tuple[Tensor, ...]:
        return self.weights.data, self.grads, self.optimizer.mean, self.optimizer.square

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, shape (n, …), of every parameter."""
        return iter(self._parameters.items())

    # -- the model -----------------------------------------------------------------------------------

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits.

        Args:
            tokens: int64, shape (n, batch, length).

        Returns:
            Shape (n, batch · length, vocab).
        """
        n, batch, length = tokens.shape
        w, s = self._parameters, self.shape
        flat = tokens.reshape(n, -1) + torch.arange(n)[:, None] * s.vocab
        x = F.embedding(flat, w["embed"].reshape(n * s.vocab, s.width))
        for i in range(s.layers):
            h = self._norm(x, w[f"{i}.attention_norm"])
            q, k, v = (_linear(h, w[f"{i}.{name}"]).view(n * batch, length, s.width) for name in ("q", "k", "v"))
            q, k, v = (x.unflatten(-1, (s.heads, -1)).transpose(1, 2) for x in (self._rotate(q), self._rotate(k), v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + _linear(y.transpose(1, 2).reshape(n, batch * length, -1), w[f"{i}.out"])
            h = self._norm(x, w[f"{i}.ffn_norm"])
            x = x + _linear(F.silu(_linear(h, w[f"{i}.gate"])) * _linear(h, w[f"{i}.up"]), w[f"{i}.down"])
        return _linear(self._norm(x, w["norm"]), w["embed"])

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.shape.width,), eps=self.shape.norm_eps) * weight[:, None, :]

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary positions for x (…, length, width), neighbouring channels as complex pairs (Su et al. 2104.09864).

        The factors are laid out as x is, all heads side by side, so that a whole sequence is one run of memory.
        """
        length, width = x.shape[-2], self.shape.width // self.shape.heads
        if length not in self._rotary:
            frequency = self.shape.rope_theta ** (-torch.arange(0, width, 2) / width)
            angle = torch.outer(torch.arange(length), frequency).repeat(1, self.shape.heads)
            self._rotary[length] = torch.polar(torch.ones_like(angle), angle).flatten()
        pairs = torch.view_as_complex(x.reshape(len(x), -1, 2))
        return torch.view_as_real(pairs * self._rotary[length]).view_as(x)

    def losses(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of each model in nats per token, shape (n,).

        Args:
            tokens: int64, shape (n, batch, length + 1); position t predicts position t + 1.
        """
        logits = self.logits(tokens[:, :, :-1])
        target = tokens[:, :, 1:].reshape(-1)
        return F.cross_entropy(logits.flatten(0, 1), target, reduction="none").view(self.n, -1).mean(1)

    def evaluate(self, tokens: Tensor) -> FloatArray:
        """`losses` without gradients, as float64 numpy."""
        with torch.no_grad():
            return self.losses(tokens).double().numpy()

    def backward(self, tokens: Tensor) -> FloatArray:
        """Fills `grads` with each model's gradient on its own tokens; returns the losses as `evaluate` does."""
        losses = self.losses(tokens)
        for mine, new in zip(
            self._gradients, torch.autograd.grad(losses.sum(), list(self._parameters.values())), strict=True
        ):
            mine.copy_(new)
        return losses.detach().double().numpy()

    def grad_norms(self) -> FloatArray:
        """L2 norm of each model's gradient, shape (n,)."""
        return torch.linalg.vector_norm(self.grads, dim=1).double().numpy()

    # -- the optimizer -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        lr: FloatArray,
        beta1: FloatArray,
        beta2: FloatArray,
        *,
        weight_decay: FloatArray | float = 0.0,
        clip: FloatArray | None = None,
        eps: float = 1e-8,
    ) -> None:
        """One AdamW update of every model, as `torch.optim.AdamW` defines it (Loshchilov & Hutter 2017, algorithm 2).

        Args:
            lr: learning rates, shape (n,).
            beta1: decay of the first moment, shape (n,).
            beta2: decay of the second moment, shape (n,).
            weight_decay: decoupled decay, multiplied by `lr`.
            clip: largest gradient norm, shape (n,), `inf` for none; as `torch.nn.utils.clip_grad_norm_`.
            eps: added to the root of the second moment.
        """
        state, scratch = self.optimizer, self._scratch
        if clip is not None and np.isfinite(clip).any():
            self.grads.mul_(_column(np.minimum(1.0, clip / (self.grad_norms() + 1e-6))))
        state.steps += 1
        state.mean.lerp_(self.grads, _column(1.0 - beta1))
        torch.mul(self.grads, self.grads, out=scratch)
        state.square.lerp_(scratch, _column(1.0 - beta2))
        torch.mul(state.square, _column(1.0 / (1.0 - beta2**state.steps)), out=scratch)
        scratch.sqrt_().add_(eps)
        torch.div(state.mean, scratch, out=scratch)
        scratch.mul_(_column(lr / (1.0 - beta1**state.steps)))
        if np.any(weight_decay):
            self.weights.data.mul_(_column(1.0 - lr * weight_decay))
        self.weights.data.sub_(scratch)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, rows, in) times weight (n, out, in), transposed."""
    return torch.bmm(x, weight.transpose(1, 2))


def _column(values: FloatArray) -> Tensor:
    """(n,) float64 → (n, 1) float32."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32))[:, None]
