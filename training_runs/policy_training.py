"""Trains a controller policy with PPO on proxy fleets."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import torch
from numpy.typing import NDArray

from lbw_rl.authority import Authority
from lbw_rl.envs.interface import DEFAULT_AUTHORITY
from lbw_rl.envs.mixture import Mixture, mixture_named
from lbw_rl.features import FEATURE_SCHEMA, FEATURES
from lbw_rl.training_runs.actor import Actor, actor_of
from lbw_rl.training_runs.fleet_vec_env import FleetVecEnv
from lbw_rl.training_runs.fleets import fleets
from lbw_rl.training_runs.hindsight import STRETCHES, Hindsight
from lbw_rl.training_runs.policy_evaluation import Judge
from lbw_rl.training_runs.ppo_session import CHECKPOINT_FILE, CURVE_FILE, PPOSession, PPOSettings
from lbw_rl.training_runs.training_monitor import Progress
from lbw_rl.training_runs.trials_stage import in_blocks, learn_from_trials
from lbw_rl.training_runs.workers import Backend

__all__ = ["CHECKPOINT_FILE", "CURVE_FILE", "STEERING", "PPOSettings", "TrainingResult", "train"]


STEERING = PPOSettings(log_std_init=-0.7, learning_rate=3e-3)
"""For multiples of a rule: half of their reach is not far, so that exploration may be wide (docs/LOG.md, 2026-11-28)."""


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
        stretches: parts of a run in each of which the actor's answer is to be held, as in the trials that it learned from; None: it
            answers at every decision.
        decisions: decisions seen in training.
        return_mean: mean return of the last episodes.
        judge: of policies, on fresh proxies of the training's kinds, authority and pace.
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
    stretches: int | None
    decisions: int
    return_mean: float
    judge: Judge
    provenance: dict[str, Any]


def train(
    decisions: int,
    seed: int,
    out: Path,
    progress: Progress | None = None,
    *,
    settings: PPOSettings | None = None,
    authority: Authority = DEFAULT_AUTHORITY,
    decide_every: int | None = None,
    rule: str | None = None,
    mixture: str | Mixture = "plain",
    backend: Backend = "local",
    resume: bool = False,
    trials: int = 0,
    proxies: int = 144,
) -> TrainingResult:
    """Trains a policy; same arguments, same bits.

    With `trials` there is a stage before PPO: runs under multiples of the rule that are drawn at random and hold for a while,
    and from hindsight the actor that PPO begins with (`lbw_rl.training_runs.hindsight`).

    Args:
        decisions: of PPO, over all proxies; rounded up to whole rollouts. With `trials` there may be none.
        seed: of tasks, weights and exploration.
        out: folder for the learning curve, the trials and the checkpoint.
        progress: called after every rollout with "decisions", "return_mean", "clip_fraction" (share of the actions
            that lay outside [-1, 1] before clipping), "entropy", "diverged" and "eta_seconds"; during trials as told in
            `learn_from_trials`.
        settings: of PPO; default: `STEERING` with a rule, else those of `PPOSettings`.
        authority: bounds on the actions.
        decide_every: optimizer steps per decision; default: 4 with a rule, which itself acts at every step, else 2.
        rule: name of the controller that actions are relative to; base runs under it then accompany the proxies, since
            what its multiples gain is small beside what sets one task apart from another.
        mixture: kinds of proxies and how many of each, or the name of one of `lbw_rl.envs.mixture.MIXTURES`; every entry is a
            fleet of its own.
        backend: "local": every fleet in a thread; "ray": in a process of a Ray cluster. The policy is the same, bit for bit.
        resume: go on from the checkpoint and the trials in `out`, if there are any.
        trials: decisions of trials, over all proxies.
        proxies: fresh ones that the result's judge has, and the points of the learning curve of trials.

    Raises:
        ValueError: nothing to train on, trials without a rule, an unknown mixture, or a checkpoint of another training.
    """
    if decisions < 0 or trials < 0 or decisions + trials < 1:
        raise ValueError(
            f"decisions={decisions} (--decisions), trials={trials} (--trials): none may be negative, and one must be at least 1"
        )
    if trials and rule is None:
        raise ValueError(f"trials={trials} need a rule (--rule): what is tried are multiples of what a rule proposes")
    settings = settings or (STEERING if rule is not None else PPOSettings())
    if decide_every is None:
        decide_every = 2 if rule is None else 4
    name, kinds = (mixture, mixture_named(mixture)) if isinstance(mixture, str) else (None, mixture)
    out.mkdir(parents=True, exist_ok=True)
    governing: dict[str, Any] = {"authority": authority, "decide_every": decide_every, "rule": rule}
    arguments = {**governing, "base_run": settings.base_run or rule is not None}
    judge = Judge(proxies, kinds=tuple(dict.fromkeys(kind for kind, _ in kinds)), **governing)
    if not resume:
        (out / CURVE_FILE).unlink(missing_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each fleet has a thread of its own
    try:
        provenance = _provenance(decisions, seed, settings, authority, decide_every, rule, name, kinds, trials)
        hindsight = None
        if trials:
            with fleets(in_blocks(kinds), {**governing, "base_run": False}, backend) as environments:
                env = FleetVecEnv(environments)
                hindsight = learn_from_trials(
                    env, trials, seed, out, settings.hidden_sizes, provenance, judge, progress, resume
                )
                env.close()
        with fleets(kinds, arguments, backend) as environments:
            env = FleetVecEnv(environments)
            session = PPOSession(env, decisions, seed, out, settings, provenance, progress, trials)
            going_on = resume and session.resume()
            if hindsight is not None and not going_on:
                session.begin_with(hindsight.actor.of_raw(hindsight.mean, hindsight.std))
            session.run()
            env.close()
            return _result(session, authority, decide_every, hindsight, judge)
    finally:
        torch.set_num_threads(threads)


def _result(
    session: PPOSession, authority: Authority, decide_every: int, hindsight: Hindsight | None, judge: Judge
) -> TrainingResult:
    """The actor in terms of normalised observations."""
    stretches = None
    if hindsight is not None and not session.decisions:
        mean, std, stretches = hindsight.mean, hindsight.std, STRETCHES
    else:
        mean, std = session.monitor.normaliser()
    told = {} if hindsight is None else {"hindsight": hindsight.report}
    return TrainingResult(
        actor=actor_of(session.model.policy).normalised(mean, std),
        untrained=session.untrained.normalised(mean, std),
        log_std=session.model.policy.log_std.detach().numpy().copy(),
        mean=mean,
        std=std,
        features=list(FEATURES),
        authority=authority,
        decide_every=decide_every,
        stretches=stretches,
        decisions=session.decisions,
        return_mean=session.monitor.return_mean,
        judge=judge,
        provenance={**session.provenance, **told},
    )


def _provenance(
    decisions: int,
    seed: int,
    settings: PPOSettings,
    authority: Authority,
    decide_every: int,
    rule: str | None,
    mixture: str | None,
    kinds: Mixture,
    trials: int,
) -> dict[str, Any]:
    from lbw_rl import __version__

    values = {
        "algorithm": " and ".join(
            ["hindsight of trials"] * bool(trials) + ["PPO (stable-baselines3)"] * bool(decisions)
        ),
        "seed": seed,
        "decisions": decisions,
        "trials": trials,
        "decide_every": decide_every,
        "rule": rule,
        "mixture": mixture,
        "authority": authority.model_dump(),
        "feature_schema": FEATURE_SCHEMA,
        "settings": asdict(settings),
        "tasks": {
            "environment": "lbw_rl/ProxyTraining-v0",
            "fleets": [{"proxies": n, **kind.record()} for kind, n in kinds],
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
