"""What governance costs: step time governed / plain, both in one process, interleaved step by step.

```
python -m lbw_rl.training_runs.benchmarks.overhead            # every size
python -m lbw_rl.training_runs.benchmarks.overhead mini-qwen2
```

Two copies of the same run take turns: one plain, one under `lbw-guard` with every signal measured and a ledger
on disk. The figure is the ratio of the median step times, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from lbw_rl.envs.model import parameter_count
from lbw_rl.envs.recipe import load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.governor import Governor


@dataclass(frozen=True)
class Size:
    """One row: a recipe, what is changed in it, and how many steps are timed."""

    recipe: str
    settings: tuple[str, ...]
    steps: int


SIZES = {
    "mini-qwen2": Size("mini-qwen2", (), 400),
    "llama-25m": Size(
        "mini-llama",
        (
            "model.hidden_size=512",
            "model.intermediate_size=1376",
            "model.num_layers=8",
            "model.num_heads=8",
            "model.num_kv_heads=8",
            "data.sequence_length=256",
            "train.batch_size=4",
            "optimizer.lr=3e-4",
        ),
        24,
    ),
}


def measure(size: Size, controller: str = "lbw-guard", warmup: int = 5) -> dict[str, Any]:
    """Times `size.steps` steps of each kind.

    Returns:
        parameters, median seconds of a plain and a governed step, their ratio with a 95 % interval, and the
        time that the governor itself accounts for as a share of a plain step.
    """
    recipe = override(load_recipe(size.recipe), [*size.settings, f"train.steps={size.steps + warmup}"])
    plain, governed = TrainingTask(recipe), TrainingTask(recipe)
    times: dict[str, list[float]] = {"plain": [], "governed": []}
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.jsonl"
        with Governor(
            governed.optimizer,
            controller,
            authority=recipe.authority,
            total_steps=size.steps + warmup,
            ledger=ledger,
        ) as governor:
            for step in range(size.steps + warmup):
                # Who goes first alternates, so that neither kind always finds the other's caches.
                order = ("plain", "governed") if step % 2 else ("governed", "plain")
                for kind in order:
                    seconds = _step(plain, None) if kind == "plain" else _step(governed, governor)
                    if step >= warmup:
                        times[kind].append(seconds)
            own = governor.summary()["overhead_seconds"] / (size.steps + warmup)
    ratio = statistics.median(times["governed"]) / statistics.median(times["plain"])
    interval = bootstrap(
        (np.array(times["governed"]), np.array(times["plain"])),
        lambda g, p, axis: np.median(g, axis=axis) / np.median(p, axis=axis),
        paired=True,
        n_resamples=2000,
        rng=np.random.default_rng(0),
        method="percentile",
    ).confidence_interval
    return {
        "parameters": parameter_count(plain.model),
        "steps": size.steps,
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        "governed_ms": 1e3 * statistics.median(times["governed"]),
        "ratio": ratio,
        "interval_95": [float(interval.low), float(interval.high)],
        "governor_own_share": own / statistics.median(times["plain"]),
    }


def _step(task: TrainingTask, governor: Governor | None) -> float:
    start = time.perf_counter()
    loss, grad_norm = task.backward()
    if governor is not None:
        governor.observe(loss, grad_norm=grad_norm, tokens=task.tokens_per_step)
    task.advance()
    return time.perf_counter() - start


def main() -> None:
    """Measures the sizes named on the command line, or all, and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch CPU threads")
    args = parser.parse_args()
    unknown = [s for s in args.sizes if s not in SIZES]
    if unknown:
        parser.error(f"unknown size {unknown[0]!r}; accepted: {', '.join(SIZES)}")
    torch.set_num_threads(args.threads)
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} torch threads",
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    print(json.dumps({**machine, "sizes": {name: measure(SIZES[name]) for name in args.sizes}}, indent=2))


if __name__ == "__main__":
    main()
