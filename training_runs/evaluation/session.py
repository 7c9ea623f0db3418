"""`lbw-rl evaluate`: every arm on every tier, resumable, in parallel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lbw_rl.controller import Controller
from lbw_rl.controllers.ppo import FrozenPolicy, newest_pretrained
from lbw_rl.policy import HEADER_FILE, load_policy
from lbw_rl.registry import load_controller
from lbw_rl.training_runs.evaluation.device_arm import BesideADevice
from lbw_rl.training_runs.evaluation.rollouts import Ends, governed, open_loop, tuned_adamw, tuned_schedule_free
from lbw_rl.training_runs.evaluation.scores import score
from lbw_rl.training_runs.evaluation.tiers import MULTIPLIERS, SEEDS, Tier
from lbw_rl.training_runs.folders import prepare_output, write_json
from lbw_rl.training_runs.freeze import UNTRAINED, Meter
from lbw_rl.training_runs.grid import record_of_machine
from lbw_rl.training_runs.workers import executor, result_of

REFERENCE, SCHEDULE_FREE = "AdamW, tuned for each task", "Schedule-Free, tuned for each task"
RULE = "LBW-Guard-style"
POLICY, REPLAY = "policy", "replay of the policy's mean scale"
DIRECT = "shipped policy that sets its scales itself"
RULES = {
    "AdamW at the task's rate": "constant",
    "random actions": "random",
    "PID": "pid",
    "EntroPIC": "entropic",
    RULE: "lbw-guard",
}
EVALUATION_FILE = "evaluation.json"
SIGNAL_GROUPS = {
    "the loss": ("loss_level", "loss_trend", "loss_jump", "loss_noise"),
    "the gradient's norm": ("grad_norm_jump", "grad_norm_level"),
    "steepness": ("steepness",),
    "the gradient's direction and entropies": (
        "grad_entropy", "grad_entropy_element", "grad_agreement", "grad_cosine", "surprise",
    ),
    "the update's size": ("displacement", "update_ratio_trend", "weight_growth"),
    "progress and schedule": ("progress", "schedule"),
}  # fmt: skip
"""Signals that a policy may have learned to need, by what they tell of; with `ablate` it goes without each. The device is not among
them: tiers have none, so that every policy is judged blind to it; with `ablate` it also runs `BESIDE_A_DEVICE`."""
BESIDE_A_DEVICE = "beside a device"
"""The change to a policy that gives it the made-up readings of a device that it had in training."""
REMEMBERED = (
    "loss_level", "loss_trend", "loss_jump", "loss_noise", "grad_norm_jump", "grad_norm_level", "grad_agreement",
    "update_ratio_trend", "weight_growth",
)  # fmt: skip
"""Features that hold this decision against earlier ones; with `ablate` a policy goes without, and sees a single frame."""
OTHER_PACES = (1, 2, 8)
"""Steps between two decisions of its own that a policy is also tried at with `ablate`, whatever it learned with."""


def evaluate(
    policies: Sequence[Path],
    tiers: Sequence[Tier],
    out: Path,
    *,
    ablate: bool = False,
    resume: bool = False,
    workers: int = 2,
    meter: Meter | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Runs every policy, every rule and the tuned optimizers on every tier and writes `evaluation.json`.

    Args:
        policies: folders of frozen policies, taken as repetitions of one training; an `untrained` folder in one is a control.
        tiers: what to judge on.
        out: output folder; every arm and tier leaves a file in `ends/`.
        ablate: let the first policy also run blind to each of `SIGNAL_GROUPS`, of a single frame, at `OTHER_PACES`, and beside a
            device.
        resume: keep what an earlier attempt finished.
        workers: processes, one torch thread each.
        meter: shows progress.
        command: the command line, for the record.

    Returns:
        `tiers`: name → the figures of `scores.score` by arm; `policies`: folder → the same figures of that policy alone; and
        what it takes to repeat them.

    Raises:
        ValueError: no policy or one that is refused, or an output folder in use.
    """
    if not policies:
        raise ValueError("policies: none given; accepted: one or more folders of frozen policies")
    if len({path.resolve() for path in policies}) < len(policies):
        raise ValueError(f"policies: {', '.join(map(str, policies))}; accepted: one or more folders, each once")
    digests = {str(path): load_policy(path).header.weights_sha256 for path in policies}
    folder = prepare_output(out, resume)
    (folder / "ends").mkdir(exist_ok=True)
    untrained = [path / UNTRAINED for path in policies if (path / UNTRAINED / HEADER_FILE).exists()]
    arms: dict[str, Any] = {REFERENCE: REFERENCE, SCHEDULE_FREE: SCHEDULE_FREE, **RULES}
    arms[DIRECT] = str(newest_pretrained("direct"))
    arms |= {f"{POLICY} {path}": str(path) for path in policies}
    arms |= {f"untrained {path}": str(path) for path in untrained[:1]}
    if ablate:
        arms |= {f"policy blind to {group}": (str(policies[0]), names) for group, names in SIGNAL_GROUPS.items()}
        arms["policy of a single frame"] = (str(policies[0]), REMEMBERED)
        arms |= {f"policy deciding every {k} steps": (str(policies[0]), k) for k in OTHER_PACES}
        arms[f"policy {BESIDE_A_DEVICE}"] = (str(policies[0]), BESIDE_A_DEVICE)
    jobs = [(tier, arm, what) for tier in tiers for arm, what in arms.items()]
    ends = _run(jobs, folder, workers, meter, 0, len(jobs) + len(tiers))
    # The replay needs what the first policy did.
    first = f"{POLICY} {policies[0]}"
    replays = [(tier, REPLAY, ends[tier.name, first]["scales"]) for tier in tiers]
    ends |= _run(replays, folder, workers, meter, len(jobs), len(jobs) + len(tiers))
    learned = [f"{POLICY} {path}" for path in policies]
    found: dict[str, Any] = {"tiers": {}, "policies": {name: {} for name in digests}}
    for tier in tiers:
        shape = (-1, tier.tasks, len(MULTIPLIERS), SEEDS)
        losses = {a: np.array(ends[tier.name, a]["losses"]).reshape(shape) for a in [*arms, REPLAY]}
        lost = {a: np.array(ends[tier.name, a]["diverged"]).reshape(shape) for a in [*arms, REPLAY]}
        joint = [{POLICY: np.concatenate([x.pop(name) for name in learned]), **x} for x in (dict(losses), dict(lost))]
        for data in joint:
            for name in [a for a in data if a.startswith("untrained ")]:
                data["untrained policy"] = data.pop(name)
        found["tiers"][tier.name] = score(joint[0], joint[1], REFERENCE, POLICY)
        for path, name in zip(digests, learned, strict=True):
            beside = {POLICY: name, REFERENCE: REFERENCE, RULE: RULE}
            alone = score(
                {arm: losses[a] for arm, a in beside.items()},
                {arm: lost[a] for arm, a in beside.items()},
                REFERENCE,
                POLICY,
            )
            found["policies"][path][tier.name] = alone[POLICY]
    found["provenance"] = {
        **record_of_machine(command),
        "policies": digests,
        "multipliers": list(MULTIPLIERS),
        "seeds": SEEDS,
        "tiers": {t.name: {"held_out": t.held_out, "tasks": t.tasks, **t.kind.record()} for t in tiers},
        "tuned": {t.name: ends[t.name, REFERENCE]["settings"] for t in tiers},
    }
    write_json(folder / EVALUATION_FILE, found)
    return found


def _run(
    jobs: Sequence[tuple[Tier, str, Any]], folder: Path, workers: int, meter: Meter | None, before: int, total: int
) -> dict[tuple[str, str], dict[str, Any]]:
    """The ends of all jobs; those on disk are not run again."""
    files = {
        (tier.name, arm): folder / "ends" / f"{_slug(tier.name)}-{_digest(arm, what)}.json" for tier, arm, what in jobs
    }
    done = {key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}
    with executor("local", workers) as submit:
        futures = {
            submit(_job, tier, arm, what): (tier.name, arm) for tier, arm, what in jobs if (tier.name, arm) not in done
        }
        for future in as_completed(futures):
            key = futures[future]
            done[key] = result_of(future)
            write_json(files[key], done[key])
            if meter is not None:
                meter.update(before + len(done), total, f"{key[0]}: {key[1]}")
    return done


def _job(tier: Tier, arm: str, what: Any) -> dict[str, Any]:
    """One arm on one tier, as JSON data."""
    settings: list[dict[str, float | str]] | None = None
    if arm == REFERENCE:
        ends, settings = tuned_adamw(tier)
    elif arm == SCHEDULE_FREE:
        ends, settings = tuned_schedule_free(tier)
    else:
        tasks = tier.draw()
        if arm == REPLAY:
            controller: Controller = open_loop(np.array(what), tasks)
        elif isinstance(what, tuple):
            controller = _ablated(*what)
        else:
            controller = load_controller(what)
        ends = governed(tier.kind, tasks, controller)
    return {"arm": arm, "tier": tier.name, **_json(ends), "settings": settings}


def _ablated(folder: str, change: Sequence[str] | int) -> Controller:
    """A policy blind to some features, at another pace, or `BESIDE_A_DEVICE`."""
    if change == BESIDE_A_DEVICE:
        return BesideADevice(FrozenPolicy(folder))
    return FrozenPolicy(folder, every=change) if isinstance(change, int) else FrozenPolicy(folder, change)


def _json(ends: Ends) -> Mapping[str, Any]:
    return {name: value.tolist() for name, value in asdict(ends).items()}


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def _digest(arm: str, what: Any) -> str:
    """Of an arm and, where it is a policy, of all that it does: another policy in the same folder is another arm."""
    content = [arm]
    for part in what if isinstance(what, tuple) else [what]:
        is_policy = isinstance(part, str) and Path(part).is_dir()
        content.append(load_policy(part).fingerprint if is_policy else json.dumps(part))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
