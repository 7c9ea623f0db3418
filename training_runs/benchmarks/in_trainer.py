"""Governance inside Hugging Face's `Trainer`, on a model many times the size of the proxies that policies learn on.

```
python -m lbw_rl.training_runs.benchmarks.in_trainer --out in-trainer
python -m lbw_rl.training_runs.benchmarks.in_trainer --arms ungoverned,lbw-guard --seeds 1 --multipliers 1
```

`mini-qwen2-1m` (82 times the weights of the default proxy, 17 times those of the largest kind in `broad`) is trained by Trainer and its own AdamW at a constant rate, without
anybody and under each controller, at multiples of AdamW's tuned rate (1e-3, docs/benchmarks.md), with shared weights and
batches. `results.json` holds final held-out losses in nats per token, and what the governor executed over the run, read from
its ledger, which stays in `ledgers/`. A run that ends no better than it began counts with its initial loss.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from lbw_rl.cli.console import meter, out
from lbw_rl.controllers.ppo import newest_pretrained
from lbw_rl.envs.corpus import Batches, held_out_windows, load_corpus
from lbw_rl.envs.model import build_model
from lbw_rl.envs.recipe import Recipe, load_recipe, override
from lbw_rl.policy import HEADER_FILE, load_policy
from lbw_rl.training_runs.benchmarks.records import Rows, fingerprint, machine, refuse_faults, run_missing
from lbw_rl.training_runs.folders import read_jsonl, write_json
from lbw_rl.training_runs.grid import parse_multiplier

RECIPE, RATE = "mini-qwen2-1m", 1e-3
ARMS = "ungoverned,lbw-guard,ppo"
MULTIPLIERS = "1/30,1,30"
PASSAGES = 6
"""Parts of a run over which its ledger is summed up."""


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark."""

    arm: str
    multiplier: float
    recipe: Recipe
    ledgers: str

    @property
    def key(self) -> str:
        """What identifies its row: everything that decides the run."""
        return fingerprint([self.arm, _policy(self.arm), self.multiplier, self.recipe.model_dump(mode="json")])

    def __str__(self) -> str:
        return f"{self.arm} × {self.multiplier:.3g} seed {self.recipe.train.seed}"


def _policy(arm: str) -> str | None:
    """Fingerprint of a policy, so that another one in the same folder is another arm; None for a rule."""
    folder = newest_pretrained() if arm == "ppo" else Path(arm)
    return load_policy(folder).fingerprint if (folder / HEADER_FILE).exists() else None


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains once with Trainer.

    Returns:
        The row: what was run, the final held-out loss in nats per token, capped, and `scales`, the geometric mean of the executed
        learning-rate scales in each of `PASSAGES` parts of the run (fewer of a very short one); None where nobody governed.

    Raises:
        RuntimeError: governance itself failed, so that this was no governed run.
    """
    import torch
    import transformers

    from lbw_rl.integrations.huggingface import GovernorCallback

    recipe, train, data = cell.recipe, cell.recipe.train, cell.recipe.data
    torch.set_num_threads(1)
    corpus = load_corpus(data)
    model = build_model(recipe.model, corpus.vocab_size, 2048, train.seed)
    batches = Batches(corpus.train, data.sequence_length, train.batch_size, train.seed)
    rows = [{"input_ids": row, "labels": row} for step in range(train.steps) for row in batches(step)]
    held_out = held_out_windows(corpus.held_out, data.sequence_length, data.eval_sequences)
    ledger = Path(cell.ledgers) / f"{cell.key}.jsonl"
    ledger.unlink(missing_ok=True)  # of an attempt that was interrupted
    governance = None
    if cell.arm != "ungoverned":
        governance = GovernorCallback(cell.arm, authority=recipe.authority, ledger=ledger, measure_device=False)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    def loss() -> float:
        model.eval()
        with torch.no_grad():
            mean = float(model(input_ids=held_out, labels=held_out).loss)
        model.train()
        return mean

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=train.steps,
            per_device_train_batch_size=train.batch_size,
            learning_rate=RATE * cell.multiplier,
            lr_scheduler_type="constant",
            weight_decay=recipe.optimizer.weight_decay,
            adam_beta1=recipe.optimizer.betas[0],
            adam_beta2=recipe.optimizer.betas[1],
            max_grad_norm=0.0,
            seed=train.seed,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = InOrder(model, arguments, train_dataset=rows, callbacks=[] if governance is None else [governance])
        trainer.remove_callback(transformers.PrinterCallback)
        initial = loss()
        trainer.train()
    final = loss()
    if governance is not None and governance.governor is not None:
        refuse_faults(governance.governor.summary())
    diverged = not (math.isfinite(final) and final < initial)
    return {
        "arm": cell.arm,
        "multiplier": cell.multiplier,
        "seed": train.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": initial if diverged else final,
        "diverged": diverged,
        "scales": None if governance is None else passages(list(read_jsonl(ledger))),
    }


def passages(ledger: Sequence[dict[str, Any]]) -> list[float]:
    """Geometric means of the executed learning-rate scales in `PASSAGES` equal parts of a ledger's decisions, or one a decision."""
    scales = [record["executed"]["lr_scale"] for record in ledger if record.get("type") == "decision"]
    parts = min(PASSAGES, len(scales))
    borders = [len(scales) * k // parts for k in range(parts + 1)]
    return [math.exp(fmean(math.log(x) for x in scales[a:b])) for a, b in itertools.pairwise(borders)]


def benchmark(
    out_dir: Path,
    arms: Sequence[str],
    multipliers: Sequence[float],
    seeds: int,
    *,
    steps: int | None = None,
    settings: Sequence[str] = (),
    workers: int = 2,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Runs what `out_dir` lacks and writes results.json there.

    Args:
        out_dir: folder of the results and ledgers.
        arms: "ungoverned", and controllers by name or folder.
        multipliers: of `RATE`.
        seeds: paired runs, numbered from 0.
        steps: of a run; default: the recipe's.
        settings: `key=value` changes of the recipe.
        workers: processes, one torch thread each.
        progress: told (runs finished, runs in all, the latest).

    Returns:
        What results.json holds: machine and rows.
    """
    length = [] if steps is None else [f"train.steps={steps}"]
    recipe = override(load_recipe(RECIPE), [*length, *settings])
    ledgers = out_dir / "ledgers"
    ledgers.mkdir(parents=True, exist_ok=True)
    cells = [
        Cell(arm, multiplier, override(recipe, [f"train.seed={seed}"]), str(ledgers))
        for seed in range(seeds)
        for multiplier in multipliers
        for arm in arms
    ]
    rows = run_missing(cells, run_cell, Rows(out_dir / "results.jsonl"), workers=workers, progress=progress)
    found = {"machine": machine(1), "rows": rows}
    write_json(out_dir / "results.json", found)
    return found


def render(rows: Sequence[dict[str, Any]]) -> Table:
    """Mean final loss of each arm at each multiple, and the scales of the first seed."""
    table = Table("arm", "× rate", "final loss, nats", "of seeds", "lr scale over the run", title=RECIPE)
    for arm, multiplier in dict.fromkeys((row["arm"], row["multiplier"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["multiplier"]) == (arm, multiplier)]
        losses = [row["final_loss"] for row in own]
        scales = "" if own[0]["scales"] is None else " ".join(f"{x:.3g}" for x in own[0]["scales"])
        table.add_row(arm, f"{multiplier:.3g}", f"{fmean(losses):.3f}", ", ".join(f"{x:.3f}" for x in losses), scales)
    return table


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/in-trainer"), help="folder of the results (%(default)s)")
    parser.add_argument("--arms", default=ARMS, help="ungoverned, controllers by name or folder (%(default)s)")
    parser.add_argument("--multipliers", default=MULTIPLIERS, help="of AdamW's tuned rate (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm and multiplier (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run; default: the recipe's")
    parser.add_argument("--workers", type=int, default=2, help="processes, one torch thread each (%(default)s)")
    args = parser.parse_args()
    try:
        multipliers = [parse_multiplier(text) for text in args.multipliers.split(",")]
        arms = [name.strip() for name in args.arms.split(",")]
        _check(arms)
        for number, name in ((args.seeds, "seeds"), (args.workers, "workers")):
            if number < 1:
                raise ValueError(f"{name}: {number} must be at least 1")
    except ValueError as e:
        parser.error(str(e))
    with meter("in Trainer") as m:
        found = benchmark(
            args.out, arms, multipliers, args.seeds, steps=args.steps, workers=args.workers, progress=m.update
        )
    out.print(render(found["rows"]))


def _check(arms: Sequence[str]) -> None:
    from lbw_rl.registry import load_controller

    for arm in arms:
        if arm != "ungoverned":
            load_controller(arm)


if __name__ == "__main__":
    main()
