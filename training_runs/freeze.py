"""From training to a frozen policy folder: train, judge on fresh proxies, write weights, header and card."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, Protocol

from lbw_rl.policy import CARD_FILE, HEADER_FILE, load_policy, save_policy
from lbw_rl.registry import check_rule
from lbw_rl.training_runs.actor import Actor
from lbw_rl.training_runs.folders import prepare_output
from lbw_rl.training_runs.policy_evaluation import Act, uniform
from lbw_rl.training_runs.policy_training import (
    CHECKPOINT_FILE,
    CURVE_FILE,
    PPOSettings,
    TrainingResult,
    train,
)
from lbw_rl.training_runs.trials_stage import TRIALS_FILE
from lbw_rl.training_runs.workers import Backend

UNTRAINED = "untrained"
"""Subfolder that holds the same network before training, frozen the same way: a control."""
_NOTES = {
    "clip_fraction": "return {return_mean:+.2f} clip {clip_fraction:.0%} entropy {entropy:+.2f}",
    "runs": "trials, {runs:.0f} runs in this part",
    "stretches": "learning from {stretches:.0f} stretches of trials",
    "judged": "judging what was learned, {judged:.0f} fresh proxies",
}
"""By what a record of progress tells."""


class Meter(Protocol):
    """Shows progress."""

    def update(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total`, with a short note."""


def train_and_freeze(
    out: str | Path,
    *,
    decisions: int,
    seed: int = 0,
    rule: str | None = None,
    resume: bool = False,
    meter: Meter | None = None,
    settings: PPOSettings | None = None,
    mixture: str = "plain",
    backend: Backend = "local",
    proxies: int = 144,
    trials: int = 0,
) -> dict[str, Any]:
    """Learns a policy on proxies and freezes it, and its untrained self, into folders that `load_controller` reads.

    Args:
        out: the policy's folder; the learning curve goes there too, and the untrained control into `untrained/`.
        decisions: decisions of PPO to learn from; at least 1, or none after trials.
        seed: of network, tasks and exploration.
        rule: name of a rule-based controller whose scales the policy multiplies; None for scales of its own.
        mixture: one of `lbw_rl.envs.mixture.MIXTURES`: what it learns on.
        backend: "local", or "ray" for fleets in processes of a Ray cluster.
        resume: go on from an earlier attempt's checkpoint; a finished policy is returned as it is.
        meter: shows decisions, return, clip fraction and entropy.
        settings: PPO settings other than the default.
        trials: decisions of trials under random multiples of the rule, from whose hindsight PPO begins.
        proxies: fresh proxies that trained, untrained and random actions are judged on.

    Returns:
        `decisions`, `gain` (mean held-out gain over the base run on fresh proxies, nats per token) and `proxies`
        (policy → its evaluation).

    Raises:
        ValueError: `rule` is none, the output folder is in use, or the checkpoint is of another training.
    """
    if rule is not None:
        check_rule(rule)  # not after the training
    folder = prepare_output(out, resume)
    if (folder / HEADER_FILE).exists():
        provenance = load_policy(folder).header.provenance
        wanted = {"seed": seed, "decisions": decisions, "trials": trials, "rule": rule, "mixture": mixture}
        if all(provenance.get(name) == value for name, value in wanted.items()):
            return _outcome(provenance)
        held = ", ".join(f"{name} {provenance.get(name)}" for name in wanted)
        raise ValueError(
            f"out: {folder} holds a policy of {held}; accepted: the same --seed, --decisions, --trials, --rule and --mixture, or another --out"
        )

    def show(record: dict[str, float]) -> None:
        if meter is not None:
            note = next(text for name, text in _NOTES.items() if name in record)
            total = trials + decisions
            meter.update(min(total, int(record["decisions"])), total, note.format(**record))

    result = train(
        decisions,
        seed,
        folder,
        show,
        settings=settings,
        rule=rule,
        mixture=mixture,
        backend=backend,
        resume=resume,
        trials=trials,
        proxies=proxies,
    )
    contenders: dict[str, Act] = {
        "trained": _on_raw(result, result.actor),
        "untrained": _on_raw(result, result.untrained),
        "random": uniform(seed),
    }
    judged = {
        name: result.judge(
            act, lambda n: show({"decisions": trials + decisions, "judged": n}), result.stretches
        ).summary()
        for name, act in contenders.items()
    }
    provenance = {**result.provenance, "trained_on_decisions": result.decisions, "proxy_evaluation": judged}
    before = {name: value for name, value in provenance.items() if name != "hindsight"}
    _freeze(folder / UNTRAINED, result, result.untrained, {**before, "trials": 0, "trained_on_decisions": 0})
    _freeze(folder, result, result.actor, provenance)
    for kept in (CHECKPOINT_FILE, TRIALS_FILE.format("*")):
        for path in folder.glob(kept):
            path.unlink()
    return _outcome(provenance)


def ship(folder: str | Path, target: str | Path, evaluation: str | Path | None = None) -> Path:
    """Copies the deployable files of a frozen policy and its learning curve, nothing else.

    Args:
        folder: of the policy.
        target: of the copy.
        evaluation: folder of an `lbw-rl evaluate` that judged this policy; its figures are added to the card.

    Raises:
        ValueError: the evaluation did not judge this policy.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("policy.safetensors", HEADER_FILE, CARD_FILE, CURVE_FILE):
        if name != CURVE_FILE or (Path(folder) / name).exists():  # no PPO, no curve
            shutil.copy2(Path(folder) / name, target / name)
    header = load_policy(target).header
    if evaluation is not None:
        card = target / CARD_FILE
        results = _held_out_results(Path(evaluation), header.weights_sha256)
        card.write_text(
            card.read_text(encoding="utf-8").replace("**Limits.**", f"{results}\n**Limits.**"), encoding="utf-8"
        )
    return target


def _held_out_results(evaluation: Path, sha256: str) -> str:
    """The tiers' table of one policy."""
    from lbw_rl.training_runs.evaluation.report import read_evaluation
    from lbw_rl.training_runs.evaluation.session import RULE

    found = read_evaluation(evaluation)
    judged = [path for path, digest in found["provenance"]["policies"].items() if digest == sha256]
    if not judged:
        raise ValueError(f"evaluation: {evaluation} did not judge this policy (weights sha256 {sha256[:16]}…)")
    rows = []
    for name, of in found["policies"][judged[0]].items():
        against = of["against"][RULE]
        figures = [(of["iqm"], of["iqm_interval"]), (against["iqm"], against["iqm_interval"])]
        cells = [f"{math.exp(x):.3f} [{math.exp(low):.3f}, {math.exp(high):.3f}]" for x, (low, high) in figures]
        held_out = found["provenance"]["tiers"][name]["held_out"]
        rows.append(
            f"| {name} | {held_out} | {cells[0]} | {cells[1]} | {of['lr_sensitivity']:.3f} | {of['diverged']:.1%} |"
        )
    return (
        "**Results on held-out tiers** (`lbw-rl evaluate`: interquartile mean of perplexity ratios over tasks, learning rates 1/30, 1 and "
        "30 × the tuned one, and seeds; 95 % bootstrap interval):\n\n"
        "| tier | held out | / AdamW tuned for each task | / `lbw-guard` | LR sensitivity, nats | diverged |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _on_raw(result: TrainingResult, actor: Actor) -> Act:
    return lambda observations: actor((observations - result.mean) / result.std)


def _outcome(provenance: dict[str, Any]) -> dict[str, Any]:
    judged = provenance["proxy_evaluation"]
    return {"decisions": provenance["trained_on_decisions"], "gain": judged["trained"]["gain"], "proxies": judged}


def _freeze(folder: Path, result: TrainingResult, actor: Actor, provenance: dict[str, Any]) -> None:
    save_policy(
        folder,
        actor.layers,
        mean=result.mean,
        std=result.std,
        authority=result.authority,
        decide_every=result.decide_every,
        provenance=provenance,
        card=_card(provenance, result.stretches),
        rule=provenance["rule"],
        stretches=result.stretches,
    )


def _tasks(fleets: list[dict[str, Any]]) -> str:
    """A line for each kind of proxies."""
    lines = [
        "| share | model | vocabulary, width, layers | tokens a step | steps | wrong labels in | faults in | texts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total = sum(fleet["proxies"] for fleet in fleets)
    for fleet in fleets:
        shape, batch, variety = fleet["shape"].get("base", fleet["shape"]), fleet["batch"], fleet["variety"]
        size = f"{shape['vocab']}, {shape['width']}, {shape.get('layers', 1)}"
        steps, texts = "–".join(map(str, fleet["horizon"])), ", ".join(fleet["corpora"])
        lines.append(
            f"| {fleet['proxies'] / total:.0%} | {fleet['model']} | {size} | {batch['sequences']} × {batch['length']} | {steps} "
            f"| {variety['noisy']:.0%} | {variety['faulty']:.0%} | {texts} |"
        )
    return "\n".join(lines)


def _how(provenance: dict[str, Any]) -> str:
    trials, decisions = provenance["trials"], provenance["trained_on_decisions"]
    if not trials:
        return "Learned with PPO on proxy runs."
    then = f", then with PPO for {decisions:,} more" if decisions else ""
    return f"Learned in hindsight from {trials:,} decisions of trials under random multiples{then}."


def _card(provenance: dict[str, Any], stretches: int | None) -> str:
    rows = "\n".join(
        f"| {name} | {s['gain']:+.3f} ± {s['standard_error']:.3f} | {s['diverged']:.1%} |"
        for name, s in provenance["proxy_evaluation"].items()
    )
    rule = provenance["rule"]
    held = f" It answers {stretches} times in a run and holds each answer through its part of it." if stretches else ""
    relative = f", as multiples of those that `{rule}` asks for at every step" if rule else ""
    return f"""# Frozen controller policy

**What it is.** A small tanh network that reads the feature vector (schema {provenance["feature_schema"]}) of a training run every
{provenance["decide_every"]} optimizer steps and proposes a learning-rate scale and a momentum scale{relative}.{held} {_how(provenance)}

**Intended use.** `Governor(optimizer, controller="THIS FOLDER", total_steps=…)`, inside whatever authority you give
it, on runs of a language model under AdamW. Features far from its training data are counted, and past the rate in
`policy.json` the rule named there takes over.

**Training data.** {provenance["trials"] + provenance["trained_on_decisions"]:,} decisions, seed {provenance["seed"]}, on tasks of the split `train` (all that
they are drawn from is in `policy.json`, under `provenance.tasks`):

{_tasks(provenance["tasks"]["fleets"])}

**Results on fresh proxies** (final held-out gain over the same-seed base run{f" under `{rule}` alone" if rule else ""}, nats per token, mean ± standard error):

| policy | gain | diverged |
|---|---|---|
{rows}

**Limits.** Proxies are tiny; nothing here shows how it does on a model that costs money. Compare it in shadow mode
first. A rule-based controller may well be better: `lbw-rl compare` shows it.
"""
