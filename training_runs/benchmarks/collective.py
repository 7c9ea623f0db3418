"""How long the ranks take to join one decision's numbers: gloo on this machine's loopback.

```
python -m lbw_rl.training_runs.benchmarks.collective --ranks 2,4
```

Every rank enters the governor's own all-reduce (`lbw_rl.exchange`) with a row of its numbers and a sample of 4 × 4,096,
as it does at each decision, with nothing else going on. The figures are the median and the 99th percentile over the calls,
of the slowest rank in each.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.table import Table

from lbw_rl.cli.console import out
from lbw_rl.exchange import Exchange
from lbw_rl.sample import SAMPLE_SIZE
from lbw_rl.training_runs.benchmarks.records import machine
from lbw_rl.training_runs.folders import write_json

WARMUP = 20


def measure(ranks: int, calls: int) -> dict[str, Any]:
    """One row: `ranks` processes, `calls` collectives after a warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(ranks, calls, folder), nprocs=ranks)
        seconds = np.stack([np.load(path) for path in sorted(Path(folder).glob("*.npy"))]).max(axis=0)
    median, worst = np.percentile(seconds, [50, 99])
    return {"ranks": ranks, "calls": calls, "median_ms": 1e3 * float(median), "p99_ms": 1e3 * float(worst)}


def _rank(rank: int, ranks: int, calls: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    exchange = Exchange()
    row, sample = np.zeros(40, np.float32), np.zeros(4 * SAMPLE_SIZE, np.float32)
    seconds = []
    for call in range(WARMUP + calls):
        exchange(row, sample, call)
        seconds.append(exchange.seconds)
    np.save(f"{folder}/{rank}.npy", np.array(seconds[WARMUP:]))
    dist.destroy_process_group()


def main() -> None:
    """Measures, prints a table and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4", help="comma-separated numbers of processes (%(default)s)")
    parser.add_argument("--calls", type=int, default=500, help="collectives timed (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/collective"), help="folder of results.json (%(default)s)"
    )
    arguments = parser.parse_args()
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", arguments.ranks):
        parser.error(f"--ranks: {arguments.ranks!r}; accepted: numbers of processes, as in 2,4")
    rows = [measure(int(ranks), arguments.calls) for ranks in arguments.ranks.split(",")]
    table = Table("ranks", "calls", "median ms", "99 % ms", title="one decision's collective, aim ≤ 10 ms")
    for row in rows:
        table.add_row(str(row["ranks"]), str(row["calls"]), f"{row['median_ms']:.2f}", f"{row['p99_ms']:.2f}")
    out.print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "results.json", {"machine": machine(1), "rows": rows})


if __name__ == "__main__":
    main()
