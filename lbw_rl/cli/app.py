"""The commands, each a thin layer over a function that Python code can call as well."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lbw_rl.cli.console import emit_json, err, meter, out
from lbw_rl.cli.evaluate import EPILOG as EVALUATE_EXAMPLE
from lbw_rl.cli.evaluate import evaluate
from lbw_rl.cli.policy import policy_app
from lbw_rl.cli.stress import EPILOG as STRESS_EXAMPLES
from lbw_rl.cli.stress import stress

if TYPE_CHECKING:
    from lbw_rl.sinks import Sink

app = typer.Typer(
    help="Learn-by-wire: a bounded governance layer above the optimizer of an LLM training run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(policy_app, name="policy")

Out = Annotated[Path, typer.Option("--out", help="Output folder; must be new or empty unless --resume.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where a killed command stopped; repeats no finished work.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe setting, e.g. train.steps=100; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
RecipeName = Annotated[str, typer.Argument(help="Name of a recipe, or path of a TOML file.")]


@app.command(epilog="Example: `lbw-rl demo --out demo`")
def demo(
    out_dir: Out = Path("demo"),
    budget: Annotated[
        str, typer.Option(help="quick: minutes on two cores; full: more seeds, a longer training.")
    ] = "quick",
    resume: Resume = False,
) -> None:
    """The whole line: train a policy on proxies, freeze it, deploy it and every rule under learning-rate stress."""
    import sys

    from lbw_rl.training_runs.demo import budget_named
    from lbw_rl.training_runs.demo import demo as demonstrate
    from lbw_rl.training_runs.report import render_table

    chosen = budget_named(budget)
    results, path = demonstrate(out_dir, chosen, meter, resume=resume, command="lbw-rl " + " ".join(sys.argv[1:]))
    out.print(render_table(results))
    out.print(f"report: {path}")


@app.command(
    epilog="Example: `lbw-rl train-policy --rule lbw-guard --mixture tokens --trials 192000 --decisions 0 --out my-policy`"
)
def train_policy(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the frozen policy.")],
    decisions: Annotated[
        int, typer.Option(help="Decisions of PPO to learn from, over all proxies; 0 only after trials.", min=0)
    ] = 60_000,
    trials: Annotated[
        int,
        typer.Option(
            help="With --rule: decisions of trials before PPO, under random multiples that hold for a while; PPO begins with what "
            "hindsight tells of them.",
            min=0,
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of network, tasks and exploration.", min=0)] = 0,
    rule: Annotated[
        str | None,
        typer.Option(
            help="Rule-based controller whose scales the policy multiplies, by up to √2 either way; default: none, the "
            "policy sets its scales within the authority itself."
        ),
    ] = None,
    mixture: Annotated[
        str,
        typer.Option(
            help="What to learn on: plain, the default proxy; broad, several kinds, for multiples of a rule; or tokens, "
            "those and models that read a real text."
        ),
    ] = "plain",
    backend: Annotated[
        str, typer.Option(help="Where the fleets of proxies run: local threads, or processes of a ray cluster.")
    ] = "local",
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Learn a policy on cheap proxy runs, with PPO or in hindsight of trials, and freeze it into a folder."""
    from lbw_rl.training_runs.freeze import train_and_freeze
    from lbw_rl.training_runs.workers import check_backend

    where = check_backend(backend)
    with meter("training policy") as m:
        result = train_and_freeze(
            out_dir,
            decisions=decisions,
            seed=seed,
            rule=rule,
            mixture=mixture,
            backend=where,
            resume=resume,
            meter=m,
            trials=trials,
        )
    if as_json:
        emit_json(result)
    else:
        out.print(
            f"frozen policy: {out_dir}  ({trials + result['decisions']:,} decisions, gain {result['gain']:.3f} nats over the base run)"
        )


@app.command(
    epilog="Examples: `lbw-rl run mini-qwen2 --controller lbw-guard --set train.lr_multiplier=30 --out run30`, "
    "`lbw-rl run qwen2.5-7b --dry-run --tflops 300`"
)
def run(
    recipe: RecipeName,
    controller: Annotated[
        str | None, typer.Option(help="Controller name or policy folder; default: the recipe's.")
    ] = None,
    settings: Settings = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Output folder; default: runs/RECIPE-CONTROLLER.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="How much governance may do: off, shadow (decide and log only), skip (skip updates), lr (also scale the "
            "rate), govern (also roll back)."
        ),
    ] = "govern",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest good checkpoint in --out, else from the beginning."),
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Serve metrics for Prometheus on this TCP port, 1 to 65535; default: on none."),
    ] = None,
    metrics_address: Annotated[
        str | None,
        typer.Option(help="Address that --metrics-port is opened on; default: 127.0.0.1, for this machine alone."),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard event files to OUT/tensorboard.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Train nothing: print parameters, memory, tokens and time, from shapes alone."),
    ] = False,
    devices: Annotated[
        int | None, typer.Option(help="With --dry-run: devices that share the weights (FSDP); default: 1.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="With --dry-run: 10^12 operations per second of each device; default: measured here."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe under a controller.

    While it runs, `echo skip > OUT/control` changes the mode, and `kill -USR1 PID` makes the governor let go for good.

    Several processes: `torchrun --nproc-per-node 8 -m lbw_rl run RECIPE --set train.parallel=fsdp`.
    """
    import json
    import signal

    from lbw_rl import launch
    from lbw_rl.envs.recipe import ControllerSpec, load_recipe, override

    chosen = load_recipe(recipe)
    name = [f"controller.name={json.dumps(controller, ensure_ascii=False)}"] if controller is not None else []
    if controller is not None and controller != chosen.controller.name:  # the options were the other one's
        chosen = chosen.model_copy(update={"controller": ControllerSpec()})
    chosen = override(chosen, [*(settings or []), *name])

    leads = launch.rank() == 0
    if dry_run:
        if leads:
            from lbw_rl.cli.estimate import print_estimate

            print_estimate(chosen, devices, tflops, as_json)
        return
    for option, value in (("devices", devices), ("tflops", tflops)):
        if value is not None:
            raise ValueError(f"{option}: {value} estimates nothing; accepted: together with --dry-run")

    from lbw_rl.training_runs.estimate import notice
    from lbw_rl.training_runs.run import SUMMARY
    from lbw_rl.training_runs.run import run as run_recipe  # torch, once the recipe is known to be good

    folder = out_dir or Path("runs") / f"{chosen.name}-{Path(chosen.controller.name).name}"
    sinks: list[Sink] = []
    if metrics_port is not None:
        if not 1 <= metrics_port <= 65535:
            raise ValueError(f"metrics-port: {metrics_port} is no TCP port; accepted: 1 to 65535")
        from lbw_rl.sinks.prometheus import PrometheusExporter

        sinks.append(PrometheusExporter(metrics_port, metrics_address or "127.0.0.1"))  # opened on the first rank alone
    elif metrics_address is not None:
        raise ValueError(f"metrics-address: {metrics_address} opens no port; accepted: together with --metrics-port")
    if tensorboard:
        from lbw_rl.sinks.tensorboard import TensorBoardSink

        sinks.append(TensorBoardSink(folder / "tensorboard"))
    if leads and not (folder / SUMMARY).exists() and (needs := notice(chosen)):
        err.print(needs)
    with meter(f"{chosen.name} · {chosen.controller.name}") if leads else nullcontext() as m:
        summary = run_recipe(
            chosen,
            folder,
            resume=resume,
            mode=mode,  # type: ignore[arg-type]  # the governor checks it
            kill_signal=getattr(signal, "SIGUSR1", None),  # Windows has none
            sinks=sinks,
            progress=(lambda done, total, loss: m.update(done, total, f"loss {loss:.3f}")) if m is not None else None,
        )
    if not leads:
        return
    if as_json:
        emit_json(summary)
        return
    state = "diverged" if summary["diverged"] else f"perplexity {summary['final_ppl']:.2f}"
    governance = summary["governor"]
    out.print(
        f"{chosen.name} · {chosen.controller.name}: held-out loss {summary['final_loss']:.4f} nats ({state}), "
        f"{summary['steps']} steps in {summary['seconds']:.1f} s, governance {summary['overhead_seconds'] / max(summary['seconds'], 1e-9):.1%}"
    )
    out.print(
        f"{governance['interventions']} of {governance['decisions']} decisions intervened, {governance['skips']} skips, "
        f"{governance['rollbacks']} rollbacks; regimes: {', '.join(f'{k} {v}' for k, v in governance['regimes'].items())}"
    )
    out.print(f"files: {folder}")


@app.command(
    epilog="Example: `lbw-rl compare mini-qwen2 --controllers constant,constant@optimizer.grad_clip=1.0,pid,lbw-guard "
    "--lr-multipliers 1/30,1,30 --seeds 3 --out cmp`"
)
def compare(
    recipe: RecipeName,
    controllers: Annotated[
        str,
        typer.Option(help="Comma-separated arms: CONTROLLER[@key=value…], optionally LABEL:=… before it."),
    ] = "constant,pid,entropic,lbw-guard,ppo",
    lr_multipliers: Annotated[
        str, typer.Option(help="Comma-separated multiples of the recipe's learning rate.")
    ] = "1/30,1,30",
    seeds: Annotated[int, typer.Option(help="Paired runs per arm and multiplier.", min=1)] = 3,
    out_dir: Out = Path("comparison"),
    settings: Settings = None,
    backend: Annotated[str, typer.Option(help="local processes, or ray.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Local processes; default: one per core.", min=1)] = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Run a grid of controllers × learning-rate multipliers × seeds and write the report."""
    import sys

    from lbw_rl.envs.recipe import load_recipe, override

    chosen = override(load_recipe(recipe), settings or [])

    from lbw_rl.training_runs.compare import compare as compare_arms
    from lbw_rl.training_runs.compare import refuse_for_all_arms
    from lbw_rl.training_runs.grid import parse_arms, parse_multiplier
    from lbw_rl.training_runs.report import build_report, render_table
    from lbw_rl.training_runs.workers import check_backend

    where = check_backend(backend)
    refuse_for_all_arms(settings or [])

    with meter(f"comparing on {chosen.name}") as m:
        results = compare_arms(
            chosen,
            parse_arms(controllers),
            [parse_multiplier(x) for x in lr_multipliers.split(",")],
            seeds,
            out_dir,
            resume=resume,
            backend=where,
            workers=workers,
            progress=lambda done, total, row: m.update(
                done, total, f"{row.arm} ×{row.lr_multiplier:.3g}: {row.final_loss:.3f}"
            ),
            command="lbw-rl " + " ".join(sys.argv[1:]),
        )
    path = build_report(out_dir)
    if as_json:
        emit_json(results.model_dump(by_alias=True))
    else:
        out.print(render_table(results))
        out.print(f"report: {path}")


app.command(epilog=STRESS_EXAMPLES)(stress)


@app.command(epilog="Example: `lbw-rl report cmp`")
def report(
    directory: Annotated[Path, typer.Argument(help="Folder of a comparison or a stress suite, with results.json.")],
) -> None:
    """Rebuild report.html from a comparison's or a suite's folder."""
    from lbw_rl.training_runs.report import build_report, render_table
    from lbw_rl.training_runs.results import read_results

    if (directory / "stress.json").is_file():
        from lbw_rl.training_runs.stress.report import build_stress_report, read_findings, render_targets

        path = build_stress_report(directory)
        out.print(render_targets(read_findings(directory)))
        out.print(f"report: {path}")
        return
    results = read_results(directory)
    path = build_report(directory)
    out.print(render_table(results))
    out.print(f"report: {path}")


@app.command(epilog="Example: `lbw-rl replay run30/ledger.jsonl --controller pid`")
def replay(
    ledger: Annotated[Path, typer.Argument(help="A ledger.jsonl that a governed run wrote.")],
    controller: Annotated[str, typer.Option(help="Controller name or policy folder that is to answer.")],
    as_json: AsJson = False,
) -> None:
    """Run a recorded run's telemetry through another controller: where and how would it have acted?"""
    from dataclasses import asdict

    from rich.table import Table

    from lbw_rl.registry import load_controller
    from lbw_rl.replay import replay as replay_ledger

    result = replay_ledger(ledger, load_controller(controller))
    if as_json:
        emit_json(asdict(result))
        return
    out.print(
        f"{controller} on the telemetry of {result.recorded_controller}: "
        f"{result.differing} of {result.decisions} decisions differ, {result.faults} faults"
    )
    out.print("regimes: " + ", ".join(f"{k} {v}" for k, v in result.regimes.items()))
    if not result.passages:
        return
    shown = sorted(sorted(result.passages, key=lambda p: p["first"] - p["last"])[:20], key=lambda p: p["first"])
    title = "where it would have acted otherwise" + (", the 20 longest" if len(result.passages) > 20 else "")
    table = Table("steps", "regime", "directive", "recorded scale", "its scale", title=title)
    for p in shown:
        steps = str(p["first"]) if p["first"] == p["last"] else f"{p['first']}–{p['last']}"
        directive = "proceed as SGD" if p["hand_over"] else p["directive"]
        table.add_row(steps, p["regime"], directive, f"{p['recorded']:.4g}", f"{p['replayed']:.4g}")
    out.print(table)


app.command(epilog=EVALUATE_EXAMPLE)(evaluate)


@app.command(epilog="Example: `lbw-rl doctor`")
def doctor(as_json: AsJson = False) -> None:
    """What this machine offers: versions, accelerator, NVML, extras, shipped policies."""
    from lbw_rl.doctor import examine

    findings = examine()
    if as_json:
        emit_json(findings)
        return
    for key, value in findings.items():
        out.print(f"{key:<18} {value}")
