"""What batching proxies brings: model steps a second of a fleet, and what else could do the same work.

```
python -m lbw_rl.training_runs.benchmarks.fleet                      # 1, 8 and 64 proxies, about ten minutes
python -m lbw_rl.training_runs.benchmarks.fleet --proxies 8 --rounds 3
python -m lbw_rl.training_runs.benchmarks.fleet --family ngram
```

**Environments**, signals, held-out losses, restarts and all: a fleet of N proxies, in as many batched programs as
there are workers, against stable-baselines3's `SubprocVecEnv` of N single-model environments, one process each, and of
as many as there are workers. A single-model environment is the fleet's own program with one model in it, so that both
do the same work; a block is a whole number of episodes, so that both restart equally often.

**Training alone**, one thread: gradient and AdamW step of N proxies, against the bare matrix products of the same
gradient (`matmul_floor`), and, for that family, against one transformers Llama of the same shape under
`torch.optim.AdamW`, as a user would write a single-model environment.

All of them take turns, block by block, each with one torch thread a process. A ratio is the median over rounds of
neighbouring blocks, with a bootstrap interval over the rounds. `results.json` holds it all, and what is in
`results.jsonl` is not measured again.

DACBench's learning-rate environment (`SGDEnv`, 0.5.6) is not among them: its `sgd` extra needs torch <= 2.10 and
torchvision, its data sets are images that torchvision downloads, and its models are convolutional, so that it neither
runs beside this package's torch nor offline, nor would it do the same work.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from lbw_rl.cli.console import meter, out
from lbw_rl.envs.families.catalogue import FAMILIES, family
from lbw_rl.envs.families.family import Family
from lbw_rl.envs.families.transformer import FleetShape
from lbw_rl.envs.fleet import Fleet
from lbw_rl.envs.proxy_runs import BatchShape
from lbw_rl.envs.proxy_training import ProxyTrainingVectorEnv
from lbw_rl.envs.tasks import sample_tasks
from lbw_rl.training_runs.benchmarks.matmul_floor import matmuls_of
from lbw_rl.training_runs.benchmarks.records import Rows, fingerprint, machine, median_interval
from lbw_rl.training_runs.benchmarks.single_proxy import SingleProxyEnv, plain_llama
from lbw_rl.training_runs.fleet_vec_env import FleetVecEnv
from lbw_rl.training_runs.folders import write_json

PROXIES = (1, 8, 64)
HORIZON = 48
DECIDE_EVERY = 2
BLOCK = 8 * HORIZON
"""Model steps of a block at least; larger fleets do more."""

Contender = Callable[[], int]
"""Runs one block; returns the model steps that it did."""
Tick = Callable[[int, int, str], None]


def measure(shape: Family, proxies: int, workers: int, rounds: int, progress: Tick | None = None) -> dict[str, Any]:
    """Times every contender at one fleet size.

    Args:
        shape: family of the proxies.
        proxies: how many of them.
        workers: processes, or threads of the fleet's, that may compute at a time.
        rounds: blocks of each contender.
        progress: told (rounds done, rounds in all, what is measured).

    Returns:
        model steps a second of each contender, and the ratios with a 95 % interval.
    """
    with ExitStack() as stack:
        contenders = _contenders(shape, proxies, workers, stack)
        for run in contenders.values():
            run()  # warms caches and allocator up
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for i in range(rounds):
            names = list(contenders)
            for name in names if i % 2 else reversed(names):  # nobody always follows the same neighbour
                start = time.perf_counter()
                steps = contenders[name]()
                seconds[name].append((time.perf_counter() - start) / steps)
            if progress is not None:
                progress(i + 1, rounds, f"{proxies} proxies")
    ratios = {
        "fleet / subproc": _ratio(seconds["subproc"], seconds["fleet"]),
        "fleet / subproc of the workers": _ratio(seconds["subproc of the workers"], seconds["fleet"]),
        "training time / floor time": _ratio(seconds["training"], seconds["floor"]),
    }
    if "llama" in seconds:
        ratios["training / llama"] = _ratio(seconds["llama"], seconds["training"])
    return {
        "family": shape.name,
        "proxies": proxies,
        "rounds": rounds,
        "steps_per_second": {name: 1.0 / median(each) for name, each in seconds.items()},
        "ratios": ratios,
    }


def _ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": median(pairs), "interval_95": median_interval(pairs)}


def _contenders(shape: Family, proxies: int, workers: int, stack: ExitStack) -> dict[str, Contender]:
    """Name → block; what has to be closed goes on `stack`."""
    parts = [len(part) for part in np.array_split(np.arange(proxies), min(workers, proxies))]
    # The task's split has no bearing on its cost; this one has tasks of every family but the quadratic's.
    split = "train" if shape.name == "quadratic" else "test"
    settings: dict[str, Any] = {
        "shape": shape,
        "horizon": (HORIZON, HORIZON),
        "decide_every": DECIDE_EVERY,
        "split": split,
    }
    single = partial(SingleProxyEnv, base_run=False, **settings)
    vectors: dict[str, VecEnv] = {
        "fleet": FleetVecEnv([ProxyTrainingVectorEnv(n, base_run=False, **settings) for n in parts]),
        "subproc": SubprocVecEnv([single] * proxies),
    }
    if workers != proxies:
        vectors["subproc of the workers"] = SubprocVecEnv([single] * workers)
    else:
        vectors["subproc of the workers"] = vectors["subproc"]
    for vector in dict.fromkeys(vectors.values()):
        stack.callback(vector.close)
        vector.seed(0)
        vector.reset()
    training, floor = _training(shape, proxies)
    steps = max(1, BLOCK // proxies)
    contenders = {
        **{name: _episodes(vector) for name, vector in vectors.items()},
        "training": _repeated(training, steps, proxies),
        "floor": _repeated(floor, steps, proxies),
    }
    if isinstance(shape, FleetShape) and shape.name == "llama":
        contenders["llama"] = _repeated(plain_llama(shape, BatchShape()), BLOCK, 1)
    return contenders


def _episodes(vector: VecEnv) -> Contender:
    """Whole episodes, `BLOCK` model steps or more, under neutral actions."""
    decisions = max(1, BLOCK // (HORIZON * vector.num_envs)) * HORIZON // DECIDE_EVERY
    actions = np.zeros((vector.num_envs, 2), dtype=np.float32)

    def run() -> int:
        for _ in range(decisions):
            vector.step(actions)
        return decisions * DECIDE_EVERY * vector.num_envs

    return run


def _training(shape: Family, proxies: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A training step of the fleet, and the matrix products in it."""
    fleet = Fleet(proxies, shape)
    fleet.reset(range(proxies), [np.random.default_rng(i) for i in range(proxies)])
    task = sample_tasks(np.random.default_rng(0), 1, model=shape.name)
    batch, _ = shape.data(task, proxies, BatchShape(), None)  # as many batches as models
    lr, beta1, beta2, decay = (np.full(proxies, value) for value in (1e-3, 0.9, 0.99, 0.01))

    def step() -> None:
        fleet.backward(batch)
        fleet.step(lr, beta1, beta2, weight_decay=decay)

    step()  # what is made once, such as a pretrained model, is no part of it
    return step, matmuls_of(lambda: fleet.backward(batch))


def _repeated(step: Callable[[], object], times: int, models: int) -> Contender:
    def run() -> int:
        for _ in range(times):
            step()
        return times * models

    return run


def benchmark(
    folder: str | Path,
    proxies: Sequence[int] = PROXIES,
    *,
    shape: Family | None = None,
    workers: int = 2,
    rounds: int = 9,
    progress: Tick | None = None,
) -> dict[str, Any]:
    """Measures every fleet size and writes `results.json`; finished rows of the folder are kept.

    Args:
        folder: for `results.jsonl`, one line a row, and `results.json`.
        proxies: fleet sizes.
        shape: family of the proxies; by default the default proxy.
        workers: processes, or threads of the fleet's, that may compute at a time.
        rounds: blocks of each contender.
        progress: told (rounds done, rounds in all, which row) as it goes.

    Returns:
        The content of `results.json`.
    """
    folder = Path(folder)
    rows, here = Rows(folder / "results.jsonl"), machine(threads=1)
    shape = shape or FleetShape()
    settings = {
        "shape": repr(shape),
        "batch": repr(BatchShape()),
        "horizon": HORIZON,
        "decide_every": DECIDE_EVERY,
        "workers": workers,
    }
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    multiprocessing.set_forkserver_preload(["lbw_rl.envs.proxy_training"])  # 64 processes share one copy of torch
    finished = []
    try:
        for n in proxies:
            # Times of another machine are no part of this measurement.
            key = fingerprint([n, rounds, BLOCK, settings, here["cpu"], here["cores"]])
            finished.append(rows.get(key) or rows.add(key, measure(shape, n, workers, rounds, progress)))
    finally:
        torch.set_num_threads(before)
    results = {"benchmark": "fleet", "machine": here, "settings": settings, "rows": finished}
    write_json(folder / "results.json", results)
    return results


def table(results: dict[str, Any]) -> Table:
    """One line per fleet size and figure."""
    shown = Table(title=f"model steps a second, {results['settings']['workers']} workers")
    shown.add_column("proxies", justify="right")
    shown.add_column("what", no_wrap=True)
    for name in ("figure", "95 %"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in results["rows"]:
        for name, value in row["steps_per_second"].items():
            shown.add_row(str(row["proxies"]), name, f"{value:,.0f}/s")
        for name, ratio in row["ratios"].items():
            interval = ratio["interval_95"]
            span = f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
            shown.add_row(str(row["proxies"]), name, f"{ratio['median']:.2f}", span)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line names and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="llama", help=f"one of {', '.join(FAMILIES)} (%(default)s)")
    parser.add_argument("--proxies", default=",".join(map(str, PROXIES)), help="fleet sizes (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that compute at a time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each contender (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/fleet"), help="folder of the results (%(default)s)")
    args = parser.parse_args(arguments)
    try:
        sizes = [_positive("proxies", text) for text in args.proxies.split(",")]
        shape = family(args.family)
        workers, rounds = _positive("workers", args.workers), _positive("rounds", args.rounds)
    except ValueError as error:
        parser.error(str(error))
    with meter("fleet") as bar:
        results = benchmark(args.out, sizes, shape=shape, workers=workers, rounds=rounds, progress=bar.update)
    out.print(table(results))
    out.print(f"{args.out / 'results.json'}")


def _positive(name: str, value: str | int) -> int:
    if not str(value).strip().isdecimal() or int(value) < 1:
        raise ValueError(f"{name}: {value!r} must be a whole number, at least 1")
    return int(value)


if __name__ == "__main__":
    main()
