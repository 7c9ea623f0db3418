"""What multiples of a rule were worth, told by whole runs: trials at random, a fit of their effects, and the actor that follows.

PPO has to find out of the noise of its own exploration, decision by decision, what a multiple does to the end of a run. Held for
a good part of a run instead, and drawn at random, a multiple shows its effect in the run's final loss itself, whatever else went
on. Runs go in blocks of the same task, weights and data that differ in their multiples alone; a run's gain is its final loss
below the mean of the others'. What was observed before a multiple was drawn cannot be its consequence, so that a fit over many
runs of

    gain = V(x) + α(x)·u − β(x)·u²,    β ≥ 0, one α and β per action

gives the causal effect of u where x was observed. (Randomised stretches as in micro-randomised trials, Klasnja et al. 2015; in
randomised blocks, Fisher 1926.)
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import huber_loss, softplus

from lbw_rl.features import FEATURES, progress_seen
from lbw_rl.training_runs.actor import Actor, FloatArray
from lbw_rl.training_runs.fleet_vec_env import FleetVecEnv

_ACTIONS, _RATE = 2, 0
_LARGEST_GAIN = 0.5  # nats: what a run that diverged lost says no more than that it was too much
_STD_FLOOR = 0.1
BLOCK = 4
"""Runs of a block. Against a base run for each, at the same cost, it is three times as much information: twice the runs, and
a mean of three others is less noisy than one run."""
STRETCHES = 3
"""Parts of a run, each under a multiple of its own; of random length in trials, of equal length under the policy that they teach."""
_FOLDS, _REPETITIONS = 5, 2
_HIDDEN = 16
_STEPS = 4000  # of the actor's fit
_NEARBY = (0.5, 1.5)  # deviations by which observations are moved to make up some that no trial began with


def refuse_another_training(path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises a ValueError if what a file was made with is not what it would be made with now."""
    if ours != theirs:
        different = [name for name in ours if ours[name] != theirs.get(name)] or sorted(theirs.keys() - ours.keys())
        raise ValueError(f"{path}: is of another training: {', '.join(different)} differ; accepted: the same arguments")


@dataclass(frozen=True, slots=True)
class Trials:
    """S stretches of runs, each under multiples drawn for it.

    Attributes:
        observations: when a stretch began, shape (S, features).
        actions: held through it, shape (S, 2).
        gains: final held-out loss of its run below the mean of the others in its block, nats per token, shape (S,).
        blocks: index of its run's block, shape (S,).
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    gains: FloatArray
    blocks: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.gains)

    def save(self, path: Path, provenance: dict[str, Any]) -> None:
        """Writes an .npz file, whole or not at all."""
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            arrays = {f.name: getattr(self, f.name) for f in fields(self)}
            np.savez_compressed(file, provenance=json.dumps(provenance), **arrays)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, provenance: dict[str, Any]) -> Trials:
        """Reads `save`'s file; nothing in it is code.

        Raises:
            ValueError: it is of another training.
        """
        with np.load(path, allow_pickle=False) as data:
            refuse_another_training(path, provenance, json.loads(str(data["provenance"])))
            return cls(**{f.name: data[f.name] for f in fields(cls)})

    @classmethod
    def joined(cls, parts: Sequence[Trials]) -> Trials:
        """All of several, with blocks counted on."""
        first = np.cumsum([0, *(int(part.blocks.max(initial=-1)) + 1 for part in parts)])
        blocks = [part.blocks + offset for part, offset in zip(parts, first)]
        arrays = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        return cls(**{**arrays, "blocks": np.concatenate(blocks)})


class _Trial:
    """One run: neutral at its first decision, of which nothing is measured yet, then `STRETCHES`."""

    def __init__(self, rng: np.random.Generator) -> None:
        first = rng.uniform(0.1, 0.5)
        self._ends = (first, rng.uniform(first + 0.1, 0.9))
        self._multiples = rng.uniform(-1.0, 1.0, (STRETCHES, _ACTIONS)).astype(np.float32)
        # Towards the ends of the reach, where there is more to see of the learning rate's effect.
        self._multiples[:, 0] = np.sign(self._multiples[:, 0]) * np.sqrt(np.abs(self._multiples[:, 0]))
        self._begun = False
        self.starts: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def action(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self._begun:
            self._begun = True
            return np.zeros(_ACTIONS, dtype=np.float32)
        progress = progress_seen(observation)
        stretch = sum(bool(progress >= end) for end in self._ends)
        return self.starts.setdefault(stretch, (observation.copy(), self._multiples[stretch]))[1]


def gather(env: FleetVecEnv, decisions: int, seed: int, progress: Callable[[int, int], None] | None = None) -> Trials:
    """Runs trials; blocks that are not whole at the end are left out.

    Args:
        env: without base runs; every fleet a multiple of `BLOCK`.
        decisions: at least so many, over all runs.
        seed: of tasks and multiples.
        progress: told, after every decision of all runs, how many were done and how many runs have ended in whole blocks.

    Raises:
        ValueError: a fleet that is no multiple of `BLOCK`.
    """
    if sizes := [e.num_envs for e in env.environments if e.num_envs % BLOCK]:
        raise ValueError(f"env: fleets of {sizes} runs; accepted: multiples of {BLOCK}")
    rng = np.random.default_rng([seed, 1])
    env.seed_blocks(seed, BLOCK)
    observations: NDArray[np.float32] = env.reset()
    trials = [_Trial(rng) for _ in range(env.num_envs)]
    ended = np.zeros(env.num_envs, dtype=np.int64)  # runs, by place
    open_blocks: dict[tuple[int, int], list[tuple[_Trial, float]]] = defaultdict(list)
    starts: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    gains: list[float] = []
    blocks: list[int] = []
    done, whole = 0, 0
    while done < decisions:
        actions = np.stack([trial.action(x) for trial, x in zip(trials, observations, strict=True)])
        step: tuple[Any, ...] = env.step(actions)
        observations, _, finished, infos = step
        done += env.num_envs
        for i in map(int, np.flatnonzero(finished)):
            key = (i // BLOCK, int(ended[i]))  # the places of a block meet the same tasks in the same order
            open_blocks[key].append((trials[i], infos[i]["episode"]["r"]))
            ended[i] += 1
            trials[i] = _Trial(rng)
            if len(open_blocks[key]) == BLOCK:
                block = open_blocks.pop(key)
                total = sum(gain for _, gain in block)
                for trial, gain in block:
                    stretches = list(trial.starts.values())
                    starts += stretches
                    gains += [gain - (total - gain) / (BLOCK - 1)] * len(stretches)
                    blocks += [whole] * len(stretches)
                whole += 1
        if progress is not None:
            progress(done, whole * BLOCK)
    return Trials(
        observations=np.array([x for x, _ in starts], dtype=np.float32).reshape(-1, len(FEATURES)),
        actions=np.array([u for _, u in starts], dtype=np.float32).reshape(-1, _ACTIONS),
        gains=np.array(gains, dtype=np.float64),
        blocks=np.array(blocks, dtype=np.int64),
    )


class _Effects:
    """V, α and β of normalised observations as several fits see them, side by side: a fit is an entry of the first dimension."""

    def __init__(self, fits: int, generator: torch.Generator) -> None:
        self.value, self.effect = (_networks(fits, outputs, generator) for outputs in (1, 2 * _ACTIONS))
        with torch.no_grad():
            self.effect[-1][..., _ACTIONS:] = -4.0  # β begins at 0.02: nearly straight

    @property
    def parameters(self) -> list[Tensor]:
        """Weights and biases in turn, of all layers."""
        return [*self.value, *self.effect]

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """α and β, shape (fits, n, 2) each, of x, shape (fits, n, features) or (1, n, features)."""
        out = _through(self.effect, x)
        return out[..., :_ACTIONS], softplus(out[..., _ACTIONS:])

    def values(self, x: Tensor) -> Tensor:
        """V, shape (fits, n)."""
        return _through(self.value, x)[..., 0]

    def gains(self, x: Tensor, u: Tensor) -> Tensor:
        """Shape (fits, n)."""
        alpha, beta = self.of(x)
        return self.values(x) + (alpha * u - beta * u * u).sum(-1)


def _networks(fits: int, outputs: int, generator: torch.Generator) -> list[Tensor]:
    """Weights (fits, in, out) and biases (fits, 1, out) of two tanh layers and a linear one that begins near nothing."""
    sizes = [len(FEATURES), _HIDDEN, _HIDDEN, outputs]
    tensors = []
    for inputs, width in pairwise(sizes):
        reach = inputs**-0.5
        tensors += [torch.empty(fits, rows, width).uniform_(-reach, reach, generator=generator) for rows in (inputs, 1)]
    tensors[-2] *= 0.1
    tensors[-1] *= 0.0
    return [tensor.requires_grad_() for tensor in tensors]


def _through(layers: Sequence[Tensor], x: Tensor) -> Tensor:
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        x = torch.tanh(x @ weight + bias)
    return x @ layers[-2] + layers[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hindsight:
    """What trials told.

    Attributes:
        actor: of normalised observations, (observation − mean) / std.
        mean: of the observations at the beginning of stretches, shape (features,).
        std: their standard deviation, at least 0.1, shape (features,).
        report: JSON data: `blocks`, `stretches`; of each fit on the blocks that it was not fitted to the `loss` (Huber, of the
            gain), the `loss_without_effects`, and the `slope` of what the effects left to explain on the effects that were
            foretold, with its standard error: 1 where they are as large as foretold, 0 where there are none.
    """

    actor: Actor
    mean: FloatArray
    std: FloatArray
    report: dict[str, Any]

    def act(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """Observations (n, features) → actions (n, 2)."""
        return self.actor((observations - self.mean) / self.std)


def learn(
    trials: Trials, seed: int, hidden: Sequence[int] = (32, 32), caution: float = 0.5, epochs: int = 60
) -> Hindsight:
    """Fits the effects several times over, each on four fifths of the blocks, and an actor to what all fits vouch for.

    The actor takes the learning rate's u of the largest (mean − `caution` · standard deviation over the fits) of α·u − β·u²: none
    where they do not agree that it gains. Momentum it leaves to the rule: other seeds' trials see nothing in its multiples, and in
    larger models they cost (docs/LOG.md, 2026-11-29). It is fitted to that on the observations that stretches began with, and on as many moved
    away from them, where the fits part and it learns to leave a run to the rule. It is to be asked when a stretch begins, since only
    there trials tell what a multiple is worth, and what it answers is to be held through it.

    Args:
        trials: of at least five blocks.
        seed: of the fits.
        hidden: widths of the actor's layers, tanh.
        caution: standard deviations. At 0.5 policies gain 2 % more on the tier `validation` than at 1, at the price of 0.01 nats
            on `mini-qwen2` (docs/LOG.md, 2026-11-29).
        epochs: passes over the trials; of them the best on the blocks left out is kept.

    Raises:
        ValueError: fewer than five blocks.
    """
    count = int(trials.blocks.max(initial=-1)) + 1
    if count < _FOLDS:
        raise ValueError(f"trials: {count} finished blocks are too few to learn from; needed: at least {_FOLDS}")
    generator = torch.Generator().manual_seed(seed)
    mean = trials.observations.mean(0).astype(np.float64)
    std = np.maximum(_STD_FLOOR, trials.observations.std(0).astype(np.float64))
    x = torch.from_numpy(((trials.observations - mean) / std).astype(np.float32))
    u = torch.from_numpy(trials.actions)
    gains = torch.from_numpy(trials.gains.clip(-_LARGEST_GAIN, _LARGEST_GAIN).astype(np.float32))
    left_out = []
    for repetition in range(_REPETITIONS):
        fold = np.empty(count, dtype=np.int64)
        fold[np.random.default_rng([seed, repetition]).permutation(count)] = np.arange(count) % _FOLDS
        left_out += [torch.from_numpy(fold[trials.blocks] == k) for k in range(_FOLDS)]
    effects, reports = _fit(x, u, gains, torch.stack(left_out), epochs, generator)
    near = torch.cat([x, *(x + d * torch.randn(x.shape, generator=generator) for d in _NEARBY)])
    actor = _imitate(near, _vouched_for(effects, near, caution), hidden, generator)
    return Hindsight(
        actor=actor, mean=mean, std=std, report={"blocks": count, "stretches": len(trials), "fits": reports}
    )


def _fit(
    x: Tensor, u: Tensor, gains: Tensor, left_out: Tensor, epochs: int, generator: torch.Generator
) -> tuple[_Effects, list[dict[str, float]]]:
    """One fit for every row of `left_out`, shape (fits, S), and what each foretells of the stretches that were left out of it."""
    fits, known = len(left_out), [torch.nonzero(~mask)[:, 0] for mask in left_out]
    effects = _Effects(fits, generator)
    optimizer = torch.optim.AdamW(effects.parameters, lr=2e-3, weight_decay=0.1)
    least = min(map(len, known))  # as many batches for all
    best, kept = torch.full((fits,), torch.inf), [p.detach().clone() for p in effects.parameters]
    for _ in range(epochs):
        order = torch.stack([rows[torch.randperm(len(rows), generator=generator)[:least]] for rows in known])
        for batch in order.split(128, dim=1):
            loss = _huber(effects.gains(x[batch], u[batch]) - gains[batch]).mean(1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            now = _mean_of(_huber(effects.gains(x[None], u) - gains), left_out)
            better = now < best
            best = torch.where(better, now, best)
            for kept_one, p in zip(kept, effects.parameters, strict=True):
                kept_one[better] = p[better]
    with torch.no_grad():
        for kept_one, p in zip(kept, effects.parameters, strict=True):
            p.copy_(kept_one)
        values, foretold = effects.values(x[None]), effects.gains(x[None], u)
    reports = []
    for mask, value, told, loss in zip(left_out, values, foretold, best.tolist(), strict=True):
        left = (gains - value)[mask]
        centred = (told - value)[mask] - (told - value)[mask].mean()
        size = float(centred.square().sum())
        reports.append(
            {
                "loss": loss,
                "loss_without_effects": float(_huber(left).mean()),
                "slope": float((centred * left).sum()) / size if size else 0.0,
                "slope_error": float(left.std()) / size**0.5 if size else 0.0,
            }
        )
    return effects, reports


def _huber(error: Tensor) -> Tensor:
    return huber_loss(error, torch.zeros_like(error), delta=0.1, reduction="none")


def _mean_of(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1)


def _vouched_for(effects: _Effects, x: Tensor, caution: float) -> Tensor:
    """The learning rate's multiples that the fits agree on, as positions, shape (n,)."""
    found = (effects.of(part[None]) for part in x.split(2**14))
    return torch.cat([_agreed(alpha[..., _RATE], beta[..., _RATE], caution) for alpha, beta in found])


@torch.no_grad()
def _agreed(alpha: Tensor, beta: Tensor, caution: float) -> Tensor:
    best, chosen = torch.zeros(alpha.shape[1:]), torch.zeros(alpha.shape[1:])
    for position in torch.linspace(-1.0, 1.0, 21):
        worth = alpha * position - beta * position**2
        sure = worth.mean(0) - caution * worth.std(0)
        better = sure > best
        best, chosen = torch.where(better, sure, best), torch.where(better, position, chosen)
    return chosen


def _imitate(x: Tensor, positions: Tensor, hidden: Sequence[int], generator: torch.Generator) -> Actor:
    """A tanh network that gives `positions` at `x` for the learning rate, and nothing for momentum."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        sizes = [x.shape[1], *hidden]
        layers: list[nn.Module] = []
        for i, o in pairwise(sizes):
            layers += [nn.Linear(i, o), nn.Tanh()]
        net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _STEPS)
    for _ in range(_STEPS):
        batch = torch.randint(len(x), (1024,), generator=generator)
        loss = (net(x[batch])[:, 0].clamp(-1.2, 1.2) - positions[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    linear = [
        (m.weight.detach().numpy().copy(), m.bias.detach().numpy().copy()) for m in net if isinstance(m, nn.Linear)
    ]
    weight, bias = linear[-1]
    return Actor([*linear[:-1], (np.pad(weight, ((0, 1), (0, 0))), np.pad(bias, (0, 1)))])
