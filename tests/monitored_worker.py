"""One rank of a governed run that goes on until the file `stop` appears: `monitored_worker.py RANK RANKS FOLDER`.

Rank 0 serves metrics and writes its port to the file `port`. The run has everything that the dashboard shows: entropy
and its target, scaled groups, a skip now and then, one fault, a gradient scaler, ranks, tokens, GPU signals.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from lbw_rl import Action, Directive, Governor, Telemetry
from lbw_rl.controllers.entropic import EntroPIC
from lbw_rl.sinks.prometheus import PrometheusExporter

VOCABULARY, LENGTH = 64, 16


class Eventful(EntroPIC):
    """EntroPIC that now and then skips, once fails, and halves the rate of the second group."""

    def act(self, telemetry: Telemetry) -> Action:
        action = super().act(telemetry)
        if telemetry.step == 25:
            raise RuntimeError("a fault on purpose")
        directive = Directive.SKIP if telemetry.step % 30 == 29 else Directive.PROCEED
        return replace(action, directive=directive, group_lr_scales=(1.0, 0.5))


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 32), torch.nn.Linear(32, VOCABULARY))
    model = torch.nn.parallel.DistributedDataParallel(model)
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = torch.optim.AdamW([{"params": groups[0]["params"]}, {"params": [g["params"][0] for g in groups[1:]]}])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    exporter = PrometheusExporter(0)
    governor = Governor(
        optimizer, Eventful(warmup=5), model=model, total_steps=10**6, stateful={"scaler": scaler}, sinks=[exporter]
    )
    if rank == 0:
        (folder / "port.new").write_text(str(exporter.port))
        (folder / "port.new").rename(folder / "port")
    generator = torch.Generator().manual_seed(rank)
    stop = torch.zeros(1)
    while not stop:
        first = torch.randint(VOCABULARY, (4, 1), generator=generator)
        tokens = (first + torch.arange(LENGTH + 1)) % VOCABULARY
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        scaler.scale(loss).backward()
        governor.observe(loss, tokens=tokens[:, 1:].numel())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        time.sleep(0.02)  # two cores are shared with Prometheus
        stop.fill_((folder / "stop").exists())
        dist.all_reduce(stop)  # all ranks at the same step
    print(json.dumps({**governor.summary(), "serves": exporter.port != 0}))
    governor.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
