"""The stage of trials: gathered in parts that outlive a killed training, each followed by what all so far have told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lbw_rl.envs.mixture import Mixture
from lbw_rl.training_runs.fleet_vec_env import FleetVecEnv
from lbw_rl.training_runs.hindsight import BLOCK, STRETCHES, Hindsight, Trials, gather, learn
from lbw_rl.training_runs.policy_evaluation import Judge
from lbw_rl.training_runs.ppo_session import CURVE_FILE, stream
from lbw_rl.training_runs.training_monitor import Progress, curve_up_to

TRIALS_PER_PART = 48_000
"""Decisions: what a training that dies among its trials loses at most, and the distance of two points of its learning curve."""
TRIALS_FILE = "trials-{}.npz"
_STREAM = 2**20  # past the streams of PPO's segments


def in_blocks(mixture: Mixture) -> Mixture:
    """A mixture for trials: whole blocks, and about twice the runs, since no base runs accompany them."""
    return tuple((kind, BLOCK * max(1, round(2 * n / BLOCK))) for kind, n in mixture)


def learn_from_trials(
    env: FleetVecEnv,
    decisions: int,
    seed: int,
    out: Path,
    hidden: Sequence[int],
    provenance: dict[str, Any],
    judge: Judge,
    progress: Progress | None,
    resume: bool,
) -> Hindsight:
    """Gathers trials, learns from them after every part, and writes the learning curve.

    Args:
        env: as in `gather`.
        decisions: of the trials, over all runs.
        seed: of tasks, multiples and fits.
        out: folder of the parts and of the curve, which gets a line of `decisions`, `runs` and what `judge` found per part.
        hidden: widths of the actor's layers.
        provenance: of the training; parts of another are refused.
        judge: tells how good a policy is.
        progress: told "decisions", with the part's "runs" in whole blocks after every decision of all runs, "stretches" when
            they are learned from, and how many proxies were "judged" of a policy.
        resume: take the parts that are there.

    Raises:
        ValueError: a part of another training, or fewer than five blocks.
    """

    def tell(decisions: int, what: str, count: int) -> None:
        if progress is not None:
            progress({"decisions": float(decisions), what: float(count)})

    curve = out / CURVE_FILE
    parts: list[Trials] = []
    found = None
    for number, first in enumerate(range(0, decisions, TRIALS_PER_PART)):
        path, last = out / TRIALS_FILE.format(number), min(decisions, first + TRIALS_PER_PART)
        if resume and path.exists():
            parts.append(Trials.load(path, provenance))
        else:

            def gathered(done: int, runs: int, first: int = first) -> None:
                tell(first + done, "runs", runs)

            parts.append(gather(env, last - first, stream(seed, _STREAM + number), gathered))
            parts[-1].save(path, provenance)
        known = curve_up_to(curve, last)
        judged = any(line["decisions"] == last for line in known)
        if last == decisions or not judged:
            so_far = Trials.joined(parts)
            tell(last, "stretches", len(so_far))
            found = learn(so_far, seed, hidden)
            if not judged:
                tell(last, "judged", 0)
                gains = judge(found.act, partial(tell, last, "judged"), STRETCHES).summary()
                with curve.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"decisions": last, "runs": BLOCK * found.report["blocks"], **gains}) + "\n")
    assert found is not None, "no decisions"
    return found
