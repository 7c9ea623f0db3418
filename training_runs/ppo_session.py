"""PPO in segments: training that can be killed at any point and resumes to the same bits."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.random import SeedSequence
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed

from lbw_rl.training_runs.actor import Actor, actor_of
from lbw_rl.training_runs.fleet_vec_env import FleetVecEnv
from lbw_rl.training_runs.hindsight import refuse_another_training
from lbw_rl.training_runs.training_monitor import Progress, TrainingMonitor

CURVE_FILE, CHECKPOINT_FILE = "learning_curve.jsonl", "checkpoint.pt"
CHECKPOINT_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOSettings:
    """What PPO is run with. γ is always 1: the undiscounted return is the final held-out gain.

    Attributes:
        n_steps: decisions of each proxy per rollout.
        batch_size: most transitions of a gradient step; the largest number up to that which divides a rollout is taken.
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

    n_steps: int = 32
    batch_size: int = 512
    n_epochs: int = 8
    learning_rate: float = 1e-3
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    entropy_coefficient: float = 0.0
    log_std_init: float = -1.5
    hidden_sizes: tuple[int, ...] = (32, 32)
    critic_sizes: tuple[int, ...] = (64, 64)
    base_run: bool = False
    rollouts_per_segment: int = 10


class PPOSession:
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
        before: int = 0,
    ) -> None:
        self.env, self.seed, self.out, self.settings = env, seed, out, settings
        self.provenance = provenance
        self.rollout = env.num_envs * settings.n_steps  # decisions
        self.rollouts = -(-decisions // self.rollout)
        self.segment = 0
        set_random_seed(stream(seed, 0))
        self.model = PPO(
            "MlpPolicy",
            env,
            n_steps=settings.n_steps,
            batch_size=next(size for size in range(settings.batch_size, 0, -1) if self.rollout % size == 0),
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
        self.monitor = TrainingMonitor(out / CURVE_FILE, self.planned, progress, before)

    @property
    def planned(self) -> int:
        """Decisions of the whole training."""
        return self.rollouts * self.rollout

    def _learning_rate(self, _: float) -> float:
        # stable-baselines3 would count progress anew in every segment.
        return self.settings.learning_rate * max(0.1, 1.0 - self.decisions / max(1, self.planned))

    @property
    def decisions(self) -> int:
        """Decisions done so far."""
        return int(self.model.num_timesteps) if hasattr(self, "model") else 0

    def begin_with(self, actor: Actor) -> None:
        """Puts an actor of raw observations in the place of the one that PPO would begin with; the critic still knows nothing."""
        policy = self.model.policy
        ours = [m for m in [*policy.mlp_extractor.policy_net, policy.action_net] if isinstance(m, torch.nn.Linear)]
        with torch.no_grad():
            for module, (weight, bias) in zip(ours, actor.layers, strict=True):
                module.weight.copy_(torch.from_numpy(weight))
                module.bias.copy_(torch.from_numpy(bias))

    def run(self) -> None:
        """Trains segment by segment until nothing is left to do."""
        self.monitor.begin(self.decisions)
        while (left := self.planned - self.decisions) > 0:
            self.segment += 1
            set_random_seed(stream(self.seed, self.segment))
            self.env.seed(stream(self.seed, self.segment))
            self.model._last_obs = None  # makes `learn` reset the environments
            length = min(left, self.settings.rollouts_per_segment * self.rollout)
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

    def resume(self) -> bool:
        """Goes on from the checkpoint, and tells whether there was one."""
        path = self.out / CHECKPOINT_FILE
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        theirs = json.loads(state["provenance"])
        refuse_another_training(path, self.provenance, theirs if state["schema"] == CHECKPOINT_SCHEMA else {})
        self.segment = state["segment"]
        self.model.num_timesteps = state["decisions"]
        self.model.policy.load_state_dict(state["policy"])
        self.model.policy.optimizer.load_state_dict(state["optimizer"])
        self.monitor.load_state_dict(state["monitor"])
        return True


def stream(seed: int, segment: int) -> int:
    """A 31-bit seed for one segment of a training."""
    return int(SeedSequence([seed, segment]).generate_state(1)[0] >> 1)
