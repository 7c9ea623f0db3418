"""What watching a run costs: the sinks' time per decision, and the time of a scrape.

```
python -m lbw_rl.training_runs.benchmarks.sinks
```

A governed run of a small network comes to the decision that has most to tell (EntroPIC past its calibration). Then each
sink is told of that decision again and again, and the exporter's text is made again and again, one thread, nothing else
in the process. The figures are medians over the calls.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from prometheus_client import CollectorRegistry, generate_latest
from rich.table import Table

from lbw_rl.cli.console import out
from lbw_rl.controllers.entropic import EntroPIC
from lbw_rl.governor import Governor
from lbw_rl.sinks import Decision, Sink
from lbw_rl.sinks.prometheus import PrometheusExporter
from lbw_rl.sinks.tensorboard import TensorBoardSink

STEPS = 60


class _Latest(Sink):
    """Keeps the latest decision."""

    decision: Decision

    def decided(self, decision: Decision) -> None:
        self.decision = decision


def measure(calls: int = 2000) -> dict[str, float]:
    """What → median microseconds; `bytes` is the size of a scrape."""
    latest, exporter, registry = _Latest(), PrometheusExporter(0), CollectorRegistry()
    registry.register(exporter)
    with tempfile.TemporaryDirectory() as folder:
        events = TensorBoardSink(Path(folder))
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.AdamW(model.parameters())
        with Governor(optimizer, EntroPIC(warmup=10), sinks=[latest, exporter, events]) as governor:
            for _ in range(STEPS):
                loss = model(torch.randn(4, 64)).pow(2).mean()
                loss.backward()
                governor.observe(loss, tokens=4)
                optimizer.step()
                optimizer.zero_grad()
            return {
                "exporter, a decision": _microseconds(lambda: exporter.decided(latest.decision), calls),
                "event file, a decision": _microseconds(lambda: events.decided(latest.decision), calls),
                "exporter, a scrape": _microseconds(lambda: generate_latest(registry), calls),
                "bytes": float(len(generate_latest(registry))),
            }


def _microseconds(call: Callable[[], object], calls: int) -> float:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * median(seconds)


def main() -> None:
    """Measures and prints a table."""
    torch.set_num_threads(1)
    table = Table("what", "median")
    for what, value in measure().items():
        table.add_row(what, f"{value:,.0f}" if what == "bytes" else f"{value:.1f} µs")
    out.print(table)


if __name__ == "__main__":
    main()
