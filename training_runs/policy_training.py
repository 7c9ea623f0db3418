"""Trains a controller policy with PPO on proxy fleets."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed

from lbw_rl.authority import Authority
from lbw_rl.envs.interface import DEFAULT_AUTHORITY
from lbw_rl.envs.proxy_training import ProxyTrainingVectorEnv
from lbw_rl.features import FEATURE_SCHEMA, FEATURES
from lbw_rl.training_runs.actor import Actor, actor_of
from lbw_rl.training_runs.fleet_vec_env import FleetVecEnv
from lbw_rl.training_runs.policy_evaluation import evaluate_actor
from lbw_rl.training_runs.training_monitor import Progress, TrainingMonitor

__all__ = ["PPOSettings", "TrainingResult", "evaluate_actor", "train"]

CURVE_FILE, CHECKPOINT_FILE = "learning_curve.jsonl", "checkpoint.pt"
CHECKPOINT_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOSettings:
    """What PPO is run with. γ is always 1: the undiscounted return is the final held-out gain.

    Attributes:
        num_envs: proxies in training at a time, over all fleets.
        fleets: separate batched programs, each in its own thread.
        n_steps: decisions of each proxy per rollout.
        batch_size: transitions per gradient step.
        n_epochs: passes over a rollout.
        learning_rate: of the first rollout; falls linearly to a tenth.
        gae_lambda: λ of generalised advantage estimation.
        clip_range: PPO's clipping of the probability ratio.
        entropy_coefficient: weight of the entropy bonus.
        log_std_init: log of the exploration noise to start from, in units of the action.
        hidden_sizes: widths of the actor's layers, tanh.
        critic_sizes: widths of the critic's layers, tanh.
        base_run: whether base runs accompany the proxies in training: not needed by the optimal policy, and half
            the cost.
        rollouts_per_segment: rollouts between two checkpoints; every segment starts fresh episodes from its own
            seed, so that a resumed training equals an uninterrupted one.
    """

    num_envs: int = 64
    fleets: int = 2
    n_steps: int = 32
    batch_size: int = 512
    n_epochs: int = 8
    learning_rate: float = 1e-3
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    entropy_coefficient: float = 0.0
    log_std_init: float = -1.0
    hidden_sizes: tuple[int, ...] = (32, 32)
    critic_sizes: tuple[int, ...] = (64, 64)
    base_run: bool = False
    rollouts_per_segment: int = 10

    @property
    def rollout(self) -> int:
        """Decisions of one rollout."""
        return self.num_envs * self.n_steps

    def __post_init__(self) -> None:
        if self.num_envs % self.fleets:
            raise ValueError(f"num_envs={self.num_envs} must be a multiple of fleets={self.fleets}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """A trained actor and what freezing it takes.

    Attributes:
        actor: of normalised observations, (observation − mean) / std.
        untrained: the actor before training, of the same observations.
        log_std: exploration noise at the end, shape (2,).
        mean: of the observations in the last rollouts, shape (features,).
        std: their standard deviation, shape (features,).
        features: names of the observations, in order.
        authority: bounds that it was trained under.
        decide_every: optimizer steps per decision.
        decisions: decisions seen in training.
        return_mean: mean return of the last episodes.
        provenance: seeds, task distribution, settings, package versions; JSON data.
    """

    actor: Actor
    untrained: Actor
    log_std: NDArray[np.float32]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    features: list[str]
    authority: Authority
    decide_every: int
    decisions: int
    return_mean: float
    provenance: dict[str, Any]


def train(
    decisions: int,
    seed: int,
    out: Path,
    progress: Progress | None = None,
    *,
    settings: PPOSettings | None = None,
    authority: Authority = DEFAULT_AUTHORITY,
    decide_every: int = 2,
    environment: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Trains a policy; same arguments, same bits.

    Args:
        decisions: decisions to train on, over all proxies; rounded up to whole rollouts.
        seed: of tasks, weights and exploration.
        out: folder for the learning curve and the checkpoint.
        progress: called after every rollout with "decisions", "return_mean", "clip_fraction" (share of the actions
            that lay outside [-1, 1] before clipping), "entropy", "diverged" and "eta_seconds".
        settings: of PPO.
        authority: bounds on the actions.
        decide_every: optimizer steps per decision.
        environment: further arguments of `ProxyTrainingVectorEnv`.
        resume: go on from the checkpoint in `out`, if there is one.

    Raises:
        ValueError: `decisions` below 1, or a checkpoint of another training.
    """
    if decisions < 1:
        raise ValueError(f"decisions={decisions} must be at least 1")
    settings = settings or PPOSettings()
    out.mkdir(parents=True, exist_ok=True)
    extra = dict(environment or {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each fleet has a thread of its own
    env = FleetVecEnv(
        [
            ProxyTrainingVectorEnv(
                settings.num_envs // settings.fleets,
                authority=authority,
                decide_every=decide_every,
                base_run=settings.base_run,
                **extra,
            )
            for _ in range(settings.fleets)
        ]
    )
    try:
        provenance = _provenance(decisions, seed, settings, authority, decide_every, extra)
        session = _Session(env, decisions, seed, out, settings, provenance, progress)
        if resume:
            session.resume()
        session.run()
        return session.result(authority, decide_every)
    finally:
        env.close()
        torch.set_num_threads(threads)


class _Session:
    """One training: PPO, its checkpoints and its learning curve."""

    def __init__(
        self,
        env: FleetVecEnv,
        decisions: int,
        seed: int,
        out: Path,
        settings: PPOSettings,
        provenance: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.env, self.seed, self.out, self.settings = env, seed, out, settings
        self.provenance = provenance
        self.rollouts = -(-decisions // settings.rollout)
        self.segment = 0
        set_random_seed(_stream(seed, 0))
        self.model = PPO(
            "MlpPolicy",
            env,
            n_steps=settings.n_steps,
            batch_size=settings.batch_size,
            n_epochs=settings.n_epochs,
            learning_rate=self._learning_rate,
            gamma=1.0,
            gae_lambda=settings.gae_lambda,
            clip_range=settings.clip_range,
            ent_coef=settings.entropy_coefficient,
            policy_kwargs={
                "net_arch": {"pi": list(settings.hidden_sizes), "vf": list(settings.critic_sizes)},
                "activation_fn": torch.nn.Tanh,
                "log_std_init": settings.log_std_init,
            },
            device="cpu",
        )
        self.untrained = actor_of(self.model.policy)
        self.monitor = TrainingMonitor(out / CURVE_FILE, self.planned, progress)

    @property
    def planned(self) -> int:
        """Decisions of the whole training."""
        return self.rollouts * self.settings.rollout

    def _learning_rate(self, _: float) -> float:
        # stable-baselines3 would count progress anew in every segment.
        return self.settings.learning_rate * max(0.1, 1.0 - self.decisions / self.planned)

    @property
    def decisions(self) -> int:
        """Decisions done so far."""
        return int(self.model.num_timesteps) if hasattr(self, "model") else 0

    def run(self) -> None:
        """Trains segment by segment until nothing is left to do."""
        self.monitor.begin(self.decisions)
        while (left := self.planned - self.decisions) > 0:
            self.segment += 1
            set_random_seed(_stream(self.seed, self.segment))
            self.env.seed(_stream(self.seed, self.segment))
            self.model._last_obs = None  # makes `learn` reset the environments
            length = min(left, self.settings.rollouts_per_segment * self.settings.rollout)
            self.monitor.begin_segment()
            self.model.learn(length, callback=self.monitor, reset_num_timesteps=False)
            self.save()

    def save(self) -> None:
        """Writes the checkpoint: tensors and plain data only, read back without unpickling code."""
        state = {
            "schema": CHECKPOINT_SCHEMA,
            "provenance": json.dumps(self.provenance),
            "segment": self.segment,
            "decisions": self.decisions,
            "policy": self.model.policy.state_dict(),
            "optimizer": self.model.policy.optimizer.state_dict(),
            "monitor": self.monitor.state_dict(),
        }
        temporary = self.out / f"{CHECKPOINT_FILE}.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / CHECKPOINT_FILE)

    def resume(self) -> None:
        """Goes on from the checkpoint, if there is one."""
        path = self.out / CHECKPOINT_FILE
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        ours, theirs = self.provenance, json.loads(state["provenance"])
        if state["schema"] != CHECKPOINT_SCHEMA or ours != theirs:
            different = [k for k in ours if ours[k] != theirs.get(k)] or ["schema"]
            raise ValueError(
                f"{path}: is of another training: {', '.join(different)} differ; accepted: the same arguments"
            )
        self.segment = state["segment"]
        self.model.num_timesteps = state["decisions"]
        self.model.policy.load_state_dict(state["policy"])
        self.model.policy.optimizer.load_state_dict(state["optimizer"])
        self.monitor.load_state_dict(state["monitor"])

    def result(self, authority: Authority, decide_every: int) -> TrainingResult:
        """The actor in terms of normalised observations."""
        mean, std = self.monitor.normaliser()
        return TrainingResult(
            actor=actor_of(self.model.policy).normalised(mean, std),
            untrained=self.untrained.normalised(mean, std),
            log_std=self.model.policy.log_std.detach().numpy().copy(),
            mean=mean,
            std=std,
            features=list(FEATURES),
            authority=authority,
            decide_every=decide_every,
            decisions=self.decisions,
            return_mean=self.monitor.return_mean,
            provenance=self.provenance,
        )


def _stream(seed: int, segment: int) -> int:
    """A 31-bit seed for one segment of a training."""
    return int(np.random.SeedSequence([seed, segment]).generate_state(1)[0] >> 1)


def _provenance(
    decisions: int, seed: int, settings: PPOSettings, authority: Authority, decide_every: int, extra: dict[str, Any]
) -> dict[str, Any]:
    from lbw_rl import __version__
    from lbw_rl.envs import tasks
    from lbw_rl.envs.fleet import FleetShape

    values = {
        "algorithm": "PPO (stable-baselines3)",
        "seed": seed,
        "decisions": decisions,
        "decide_every": decide_every,
        "authority": authority.model_dump(),
        "feature_schema": FEATURE_SCHEMA,
        "settings": asdict(settings),
        "tasks": {
            "environment": "lbw_rl/ProxyTraining-v0",
            "model": asdict(FleetShape()),
            "lr_error": tasks.LR_ERROR,
            "well_tuned": tasks.WELL_TUNED,
            "tuned_lr": tasks.TUNED_LR,
            "schedules": tasks.SCHEDULES,
            "corpora": tasks.CORPORA,
            "changed": {k: repr(v) for k, v in extra.items()},
        },
        "versions": {
            "lbw_rl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "gymnasium": gymnasium.__version__,
            "stable_baselines3": stable_baselines3.__version__,
        },
    }
    return dict(json.loads(json.dumps(values)))
