"""A run killed by SIGKILL, again and again, and resumed in a fresh process ends as if nothing had happened."""

import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sysconfig
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")

from lbw_rl.envs.recipe import Recipe, load_recipe, override, recipe_from_dict
from lbw_rl.training_runs import checkpoints, folders
from lbw_rl.training_runs.run import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL"),
]

# Imported once, not in every child. Not this module: the fork server does not know this folder (Python 3.11).
HEAVY = [
    "pytest",
    "lbw_rl.training_runs.run",
    "tokenizers",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.tokenization_utils_tokenizers",
]

KILLS = 30
STEPS = 24
SETTINGS = [
    f"train.steps={STEPS}",
    "train.checkpoint_every=4",
    "train.eval_every=6",
    "train.measure_device=false",
    "train.lr_multiplier=3",
    "optimizer.grad_clip=1.0",
    "controller.name=lbw-guard",
    "authority.max_rollbacks=2",
]


@pytest.fixture
def recipe(tiny: list[str]) -> Recipe:
    return override(load_recipe("mini-qwen2"), [*tiny, *SETTINGS])


# ---- the process that is killed

Death = tuple[str, int]
"""("step", n): some time after step n of this process; (a place of WITHIN or AT_THE_END, n): there, the n-th time."""

WITHIN = ("half the bytes", "before fsync", "before rename", "after rename", "before removal", "after removal")
AT_THE_END = ("half the model", "model in place", "model aside", "before the summary")  # "aside": of the one in place


def live(recipe: dict[str, Any], out: str, death: Death | None, line: Connection) -> None:
    """Resumes the run; says "here" where it is to be killed and waits for it, else "done" with what was warned of."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lbw_rl").addHandler(handler)
    counts: Counter[str] = Counter()

    def reached(place: str) -> bool:
        counts[place] += 1
        return (place, counts[place]) == death

    def wait_at(place: str) -> None:
        if reached(place):
            line.send("here")
            time.sleep(600)

    def progress(*_: Any) -> None:
        if reached("step"):
            line.send("here")  # and goes on: the kill comes when it comes

    _watch_checkpoints(wait_at)
    _watch_the_end(wait_at)
    run(recipe_from_dict(recipe), out, resume=True, progress=progress)
    line.send(said)


def _watch_checkpoints(reach: Any) -> None:
    save, remove, sync_folder = checkpoints.torch.save, checkpoints._remove, checkpoints.sync_folder

    def half(content: Any, file: Any) -> None:
        save(content, file)
        size = file.tell()
        file.flush()
        os.truncate(file.name, size // 2)
        reach("half the bytes")
        file.seek(0)
        file.truncate()
        save(content, file)

    def fsync(descriptor: int) -> None:
        reach("before fsync")
        os.fsync(descriptor)

    def replace(*paths: Path) -> None:
        reach("before rename")
        os.replace(*paths)
        reach("after rename")

    def removal(path: Path) -> None:
        old = path.suffix == ".pt"
        if old:
            reach("before removal")
        remove(path)
        if old:
            reach("after removal")

    checkpoints.torch = SimpleNamespace(save=half, load=checkpoints.torch.load, cuda=checkpoints.torch.cuda)  # type: ignore
    checkpoints.os = SimpleNamespace(fsync=fsync, replace=replace)  # type: ignore[attr-defined]
    checkpoints._remove, checkpoints.sync_folder = removal, sync_folder


def _watch_the_end(reach: Any) -> None:
    names = run.__globals__
    save_pretrained, write_json, replace = names["TrainingTask"].save_pretrained, names["write_json"], os.replace

    def half_the_model(self: Any, folder: Path) -> None:
        save_pretrained(self, folder)
        weights = folder / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) // 2])
        reach("half the model")
        weights.write_bytes(content)

    def watched(source: Path, target: Path) -> None:
        replace(source, target)
        if target.name == "model.old.tmp":
            reach("model aside")
        elif target.name == "model":
            reach("model in place")

    def summary(path: Path, value: Any) -> None:
        if path.name == "summary.json":
            reach("before the summary")
        write_json(path, value)

    names["TrainingTask"].save_pretrained, names["write_json"] = half_the_model, summary
    os_here = {name: getattr(os, name) for name in ("open", "close", "fsync", "O_RDONLY", "name", "SEEK_END")}
    folders.os = SimpleNamespace(**os_here, replace=watched, access=os.access, W_OK=os.W_OK, strerror=os.strerror)  # type: ignore


# ---- the one that kills


class Killer:
    """Starts a life of the run in a fresh process, forked off one that has imported everything and computed nothing."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe.model_dump(mode="json")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(HEAVY)
        self.random = random.Random(20)

    def live(self, out: Path, death: Death | None = None) -> list[str] | None:
        """None where it was killed; else it is finished, and this is what was warned of."""
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=live, args=(self.recipe, str(out), death, theirs))
        process.start()
        theirs.close()
        answer = ours.recv()  # EOFError: it died by itself
        if answer == "here":
            if death is not None and death[0] == "step":
                time.sleep(self.random.uniform(0.0, 0.03))
            process.kill()
            process.join()
            # It may have come to its end in those milliseconds.
            return None if process.exitcode == -signal.SIGKILL else ours.recv()
        process.join()
        assert process.exitcode == 0
        return answer


def outcome(out: Path) -> dict[str, Any]:
    """All that a finished run left, without what is read off a clock."""
    left: dict[str, Any] = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    metrics = [json.loads(line) for line in left.pop("metrics.jsonl").splitlines()]
    summary = json.loads(left.pop("summary.json"))
    for record in (*metrics, summary, summary["governor"]):
        for key in ("seconds", "overhead_seconds"):
            record.pop(key, None)
    return {**left, "metrics": metrics, "summary": summary}


def assert_equal(out: Path, straight: dict[str, Any]) -> None:
    left = outcome(out)
    assert left["model/model.safetensors"] == straight["model/model.safetensors"]
    assert left["ledger.jsonl"] == straight["ledger.jsonl"]
    assert left["metrics"] == straight["metrics"]
    assert left == straight  # nothing else differs, and nothing is left over


def test_thirty_kills_at_any_moment_change_not_a_bit(recipe, tmp_path):
    killer = Killer(recipe)
    warned = killer.live(tmp_path / "straight")
    straight = outcome(tmp_path / "straight")
    assert straight["summary"]["governor"]["interventions"] > 0  # there is something to get wrong
    assert warned is not None

    planned = [place for within in WITHIN for place in (within, "step")] + [*AT_THE_END, "step", "step", *WITHIN]
    planned += ["step"] * (KILLS - len(planned))
    killed: list[str] = []
    runs = itertools.count()
    out = tmp_path / f"run{next(runs)}"
    while len(killed) < KILLS:
        place = planned[len(killed)]
        nth = killer.random.randint(1, 9) if place == "step" else 1
        finished = killer.live(out, (place, nth))
        if finished is None:
            killed.append(place)
        else:  # it was over before it came to that place
            assert set(finished) <= set(warned)  # no kill leaves a checkpoint that has to be passed over
            assert_equal(out, straight)
            out = tmp_path / f"run{next(runs)}"
            assert int(out.name[3:]) < 2 * KILLS, f"never came to {place}"
    assert killer.live(out) is not None
    assert_equal(out, straight)
    assert sum(place in WITHIN for place in killed) == 2 * len(WITHIN)


def test_a_killed_command_goes_on_with_resume(recipe, tmp_path, tiny):
    """The real thing: `lbw-rl run`, `kill -9`, a damaged newest checkpoint, `lbw-rl run --resume`."""
    command = [Path(sysconfig.get_path("scripts")) / "lbw-rl", "run", "mini-qwen2"]
    for setting in [*tiny, *SETTINGS, "train.steps=120"]:
        command += ["--set", setting]
    out = tmp_path / "out"
    with subprocess.Popen([*command, "--out", out], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list(out.glob("checkpoints/*.pt"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    older, newest = sorted((out / "checkpoints").glob("*.pt"))[-2:]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)

    resumed = subprocess.run([*command, "--out", out, "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    (line,) = [line for line in resumed.stderr.splitlines() if "passed over" in line]
    assert line.startswith(f"checkpoint {newest.name} passed over: its content was altered or cut short")
    assert line.endswith(f"{older.name} is used instead")
    subprocess.run([*command, "--out", tmp_path / "straight"], capture_output=True, check=True)
    assert_equal(out, outcome(tmp_path / "straight"))
