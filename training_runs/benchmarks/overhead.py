"""What governance costs: step time governed / plain, both in one process, in blocks that take turns.

```
python -m lbw_rl.training_runs.benchmarks.overhead                           # every size, both loops
python -m lbw_rl.training_runs.benchmarks.overhead --sizes 0.2M,5M --loops plain
python -m lbw_rl.training_runs.benchmarks.overhead --device cuda             # larger models in bfloat16, on the GPU
```

Llama models on random tokens, governed by `lbw-guard` with every signal measured at every step and a ledger on
disk, in a plain loop and in Hugging Face's `Trainer`. The figure is the median over pairs of neighbouring blocks of
median governed / median plain step, with a bootstrap interval over the pairs: what else the machine does weighs on
both blocks of a pair. On a GPU a block is timed as a whole, between two waits for the device: a wait within it
would hide what governance costs there. Beside it, the memory that the governor holds on to. `results.json` holds it all, and what is
in `results.jsonl` is not measured again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from lbw_rl.cli.console import meter, out
from lbw_rl.envs.model import build_model
from lbw_rl.envs.optim import build_optimizer
from lbw_rl.envs.recipe import ModelSpec, OptimizerSpec
from lbw_rl.governor import Governor
from lbw_rl.snapshot import Snapshot
from lbw_rl.training_runs.benchmarks.records import Rows, choose, fingerprint, machine, median_interval, refuse_faults
from lbw_rl.training_runs.folders import write_json

CONTROLLER = "lbw-guard"
WARMUP = 3
"""Steps that are not counted: of each run of the plain loop, and of each segment of a Trainer."""


@dataclass(frozen=True)
class Size:
    """One row's model and batch.

    Attributes:
        hidden, intermediate, layers, heads, vocabulary: of the Llama model; embeddings are tied.
        batch: sequences a step.
        length: tokens a sequence.
        steps: counted steps of each kind.
        block: counted steps of one kind before the other takes its turn.
        dtype: of the weights.
        implementation: of AdamW, torch's kernel choice.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    length: int
    steps: int
    block: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: Literal["foreach", "fused"] = "foreach"


SIZES = {
    "0.2M": Size(64, 176, 3, 4, 1024, batch=8, length=64, steps=400, block=10),
    "5M": Size(256, 688, 4, 4, 8192, batch=4, length=128, steps=96, block=6),
    "25M": Size(512, 1376, 6, 8, 12288, batch=4, length=256, steps=32, block=4),
    "110M": Size(768, 2048, 12, 12, 32000, batch=2, length=256, steps=24, block=4),
}
CUDA_SIZES = {
    "5M": Size(256, 688, 4, 4, 8192, batch=16, length=256, steps=600, block=50),
    "110M": Size(768, 2048, 12, 12, 32000, 16, 512, steps=300, block=25, dtype="bfloat16", implementation="fused"),
    "1.3B": Size(2048, 5632, 22, 16, 32000, 8, 1024, steps=120, block=10, dtype="bfloat16", implementation="fused"),
}
"""What a GPU is given, in a plain loop."""

Tick = Callable[[int, int, str], None]
Times = dict[str, list[list[float]]]
"""Kind → blocks → seconds of each counted step."""


def measure(size: Size, loop: str, progress: Tick | None = None, device: str = "cpu") -> dict[str, Any]:
    """Times `size.steps` steps of each kind.

    Args:
        size: model, batch and number of steps.
        loop: "plain" or "trainer".
        progress: told (steps done, steps in all, what is measured).
        device: "cpu" or "cuda"; the Trainer's loop runs on the CPU alone.

    Returns:
        parameters, milliseconds of a plain and a governed step, their ratio with a 95 % interval, the time that
        the governor itself accounts for as a share of a plain step, and the bytes that it holds.

    Raises:
        ValueError: a Trainer's loop on a GPU.
        RuntimeError: governance itself failed, so that what was timed was not governance.
    """
    if loop == "trainer" and device != "cpu":
        raise ValueError(f"device: {device!r} does not go with the loop 'trainer'; accepted: 'cpu'")
    times: Times = {"plain": [], "governed": []}
    with tempfile.TemporaryDirectory() as folder:
        if loop == "plain":
            governor, held = _plain_loop(size, Path(folder), times, progress, torch.device(device))
        else:
            governor, held = _trainer_loop(size, Path(folder), times, progress)
    pairs = [median(g) / median(p) for g, p in zip(times["governed"], times["plain"], strict=True)]
    plain, governed = (median(s for block in times[kind] for s in block) for kind in ("plain", "governed"))
    state = state_bytes(governor.optimizer)
    return {
        "parameters": sum(p.numel() for group in governor.optimizer.param_groups for p in group["params"]),
        "tokens_per_step": size.batch * size.length,
        "steps": size.block * len(pairs),
        "blocks": len(pairs),
        "plain_ms": 1e3 * plain,
        "governed_ms": 1e3 * governed,
        "ratio": median(pairs),
        "interval_95": median_interval(pairs),
        "governor_own_share": governor.summary()["overhead_seconds"] / max(1, governor.step) / plain,
        "governor_bytes": held,
        "model_and_optimizer_bytes": state,
        "memory_ratio": 1.0 + held / state,
    }


def _plain_loop(
    size: Size, folder: Path, times: Times, progress: Tick | None, device: torch.device
) -> tuple[Governor, int]:
    """Two copies of a run, each at its own optimizer, block by block; gives the governor and the bytes it held."""
    runs = {kind: _Run(size, device) for kind in times}
    total = size.steps + WARMUP
    optimizer = runs["governed"].optimizer
    with Governor(optimizer, CONTROLLER, total_steps=total, ledger=folder / "ledger.jsonl") as governor:
        for _ in range(WARMUP):
            runs["plain"].step(None)
            runs["governed"].step(governor)
        for i in range(-(-size.steps // size.block)):
            for kind in _order(i):
                observer = governor if kind == "governed" else None
                times[kind].append(runs[kind].block(size.block, observer))
            if progress is not None:
                progress(min(size.steps, (i + 1) * size.block), size.steps, "")
        held = held_bytes(governor)  # before it closes and lets go of it
    refuse_faults(governor.summary())
    return governor, held


class _Run:
    """A model, its optimizer and one batch, in a loop that a user would write."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.model = _model(size).to(device)
        spec = OptimizerSpec(lr=3e-4, implementation=size.implementation)
        self.optimizer = build_optimizer(spec, self.model, 3e-4)
        self.tokens = _tokens(size, size.batch).to(device)
        self.device = device

    def block(self, steps: int, governor: Governor | None) -> list[float]:
        """Seconds of each of so many steps; on a GPU their mean alone."""
        if self.device.type == "cpu":
            return [self.step(governor) for _ in range(steps)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(governor)
        torch.cuda.synchronize()
        return [(time.perf_counter() - start) / steps]

    def step(self, governor: Governor | None) -> float:
        """Trains one step and returns its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        if governor is not None:
            governor.observe(loss, tokens=self.tokens.numel())
        self.optimizer.step()
        return time.perf_counter() - start


def _trainer_loop(size: Size, folder: Path, times: Times, progress: Tick | None) -> tuple[Governor, int]:
    """Short trainings of fresh Trainers that share one model take turns; timed from step begin to step end."""
    import transformers

    from lbw_rl.integrations.huggingface import GovernorCallback

    class Stopwatch(transformers.TrainerCallback):
        def __init__(self, governance: GovernorCallback | None) -> None:
            self.seconds: list[float] = []
            self.held = 0
            self._governance = governance
            self._start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds.append(time.perf_counter() - self._start)
            governor = self._governance.governor if self._governance is not None else None
            if governor is not None and state.global_step == state.max_steps:
                self.held = held_bytes(governor)  # before it closes and lets go of it

    model = _model(size)
    data = [{"input_ids": row, "labels": row} for row in _tokens(size, 8 * size.batch)]
    args = transformers.TrainingArguments(
        str(folder),
        max_steps=WARMUP + size.block,
        per_device_train_batch_size=size.batch,
        learning_rate=3e-4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def segment(kind: str, number: int) -> tuple[Governor, int] | None:
        governed = kind == "governed"
        governance = GovernorCallback(CONTROLLER, ledger=folder / f"ledger{number}.jsonl") if governed else None
        watch = Stopwatch(governance)
        callbacks = [watch, *([] if governance is None else [governance])]
        trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        times[kind].append(watch.seconds[WARMUP:])
        if governance is None or governance.governor is None:
            return None
        refuse_faults(governance.governor.summary())
        return governance.governor, watch.held

    measured = None
    for i in range(-(-size.steps // size.block)):
        for kind in _order(i):
            measured = segment(kind, i) or measured
        if progress is not None:
            progress(min(size.steps, (i + 1) * size.block), size.steps, "")
    assert measured is not None
    return measured


LOOPS = ("plain", "trainer")


def _order(i: int) -> tuple[str, str]:
    # Who goes first alternates, so that neither kind always finds the other's caches.
    return ("plain", "governed") if i % 2 else ("governed", "plain")


def _model(size: Size) -> torch.nn.Module:
    spec = ModelSpec(
        architecture="llama",
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_layers=size.layers,
        num_heads=size.heads,
        num_kv_heads=size.heads,
        dtype=size.dtype,
    )
    return build_model(spec, size.vocabulary, size.length, seed=0).train()


def _tokens(size: Size, rows: int) -> torch.Tensor:
    return torch.randint(size.vocabulary, (rows, size.length), generator=torch.Generator().manual_seed(0))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's parameters and state tensors; gradients and activations do not count."""
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for p in owned for t in (p, *optimizer.state.get(p, {}).values())]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def held_bytes(governor: Governor) -> int:
    """Bytes of the tensors and arrays that a governor holds besides the run's own and the snapshot's."""
    optimizer = governor.optimizer
    own = {t.untyped_storage().data_ptr() for t in _tensors(optimizer.state, set())}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        own |= {t.untyped_storage().data_ptr() for t in (parameter, parameter.grad) if t is not None}
    storages = {}
    seen = {id(optimizer)}
    for tensor in _tensors(governor, seen):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:  # a view of a weight costs nothing
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors reachable from `value` without passing through a model or a snapshot; arrays come as tensors."""
    if id(value) in seen or isinstance(value, torch.nn.Module | Snapshot | type) or callable(value):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, np.ndarray):
        yield torch.from_numpy(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _tensors(item, seen)
    elif type(value).__module__.startswith("lbw_rl"):
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        names = [*getattr(value, "__dict__", ()), *slots]
        for name in names:
            yield from _tensors(getattr(value, name, None), seen)


def benchmark(
    folder: str | Path,
    sizes: Mapping[str, Size],
    loops: Sequence[str] = LOOPS,
    *,
    threads: int = 1,
    device: str = "cpu",
    progress: Tick | None = None,
) -> dict[str, Any]:
    """Measures every size in every loop and writes `results.json`; finished rows of the folder are kept.

    Args:
        folder: for `results.jsonl`, one line a row, and `results.json`.
        sizes: label → what is measured.
        loops: names of `LOOPS`.
        threads: torch CPU threads.
        device: "cpu" or "cuda".
        progress: told (steps done, steps in all, which row) as it goes.

    Returns:
        The content of `results.json`.
    """
    folder = Path(folder)
    rows = Rows(folder / "results.jsonl")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    here = machine(threads)
    if device == "cuda":
        here["gpu"] = torch.cuda.get_device_name()
    finished = []
    try:
        for name, size in sizes.items():
            for loop in loops:
                # Times of another machine are no part of this measurement.
                key = fingerprint(
                    [name, asdict(size), loop, CONTROLLER, WARMUP, here["cpu"], here["cores"], here.get("gpu"), threads]
                )
                row = rows.get(key)
                if row is None:
                    tick = None if progress is None else _labelled(progress, f"{name} {loop}")
                    row = rows.add(key, {"size": name, "loop": loop, **measure(size, loop, tick, device)})
                finished.append(row)
    finally:
        torch.set_num_threads(before)
    settings = {
        "controller": CONTROLLER,
        "warmup": WARMUP,
        "sizes": {name: asdict(size) for name, size in sizes.items()},
    }
    results = {"benchmark": "overhead", "machine": here, "settings": settings, "rows": finished}
    write_json(folder / "results.json", results)
    return results


def _labelled(progress: Tick, label: str) -> Tick:
    return lambda done, total, _: progress(done, total, label)


def table(results: dict[str, Any]) -> Table:
    """One line per size and loop."""
    shown = Table(title="step time governed / plain")
    for name in ("model", "loop"):
        shown.add_column(name, no_wrap=True)
    for name in ("parameters", "tokens", "plain ms", "ratio", "95 %", "governor holds", "memory"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in results["rows"]:
        interval = row["interval_95"]
        shown.add_row(
            row["size"],
            row["loop"],
            f"{row['parameters']:,}",
            str(row["tokens_per_step"]),
            f"{row['plain_ms']:.1f}",
            f"{row['ratio']:.3f}",
            f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "",
            f"{row['governor_bytes'] / 1024:.0f} KiB",
            f"{row['memory_ratio']:.4f}",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line names and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (%(default)s)")
    parser.add_argument("--sizes", help=f"of {','.join(SIZES)}, or {','.join(CUDA_SIZES)} on a GPU (all)")
    parser.add_argument("--loops", help="of plain,trainer (both); a GPU has the plain one alone")
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"), help="folder of the results (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch CPU threads (%(default)s)")
    args = parser.parse_args(arguments)
    try:
        sizes, loops = (SIZES, LOOPS) if args.device == "cpu" else (CUDA_SIZES, LOOPS[:1])
        names = choose(args.sizes or ",".join(sizes), list(sizes), "sizes")
        chosen_loops = choose(args.loops or ",".join(loops), loops, "loops")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: 'cuda' is not there; accepted here: 'cpu'")
        if args.threads < 1:
            raise ValueError(f"threads: {args.threads} must be at least 1")
    except ValueError as error:
        parser.error(str(error))
    with meter("overhead") as bar:
        chosen = {name: sizes[name] for name in names}
        results = benchmark(
            args.out, chosen, chosen_loops, threads=args.threads, device=args.device, progress=bar.update
        )
    out.print(table(results))
    out.print(f"{args.out / 'results.json'}")


if __name__ == "__main__":
    main()
