"""`lbw-rl run` as one of several processes: who speaks, and what is said of a rank that is lost."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from prometheus_server import free_port, until

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX alone")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lbw_rl"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.fixture
def launched(monkeypatch):
    """Makes this process one of two ranks, whose store it holds as torchrun does."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    yield lambda rank: monkeypatch.setenv("RANK", str(rank))
    del store


def test_ranks_that_fail_alike_say_it_once_and_others_say_who_they_are(launched, lbw, monkeypatch):
    launched(0)
    assert lbw("run", "nobody").refusal().startswith("recipe: unknown name 'nobody'; known: ")
    launched(1)
    assert lbw("run", "nobody") == (2, "", "")
    assert lbw("run", "somebody").refusal().startswith("rank 1: recipe: unknown name 'somebody'; known: ")
    launched(0)
    assert lbw("compare", "mini-qwen2").refusal() == "compare: is of one process; accepted from 2: run"
    assert lbw("stress", "--dry-run").refusal() == "stress: is of one process; accepted from 2: run"
    monkeypatch.setenv("WORLD_SIZE", "two")
    accepted = "accepted: what torchrun sets, or the variable unset"
    assert lbw("run", "mini-qwen2").refusal() == f"WORLD_SIZE: 'two' is no number; {accepted}"


def test_a_dry_run_is_printed_by_the_first_rank_alone(launched, lbw, small, monkeypatch):
    arguments = ("run", "mini-qwen2", *small, "--dry-run", "--tflops", "1")
    launched(0)
    assert lbw(*arguments).out.startswith("mini-qwen2: ")
    assert lbw(*arguments, "--devices", "0").refusal().startswith("devices: 0 is too few")
    launched(1)
    assert lbw(*arguments) == (0, "", "")
    assert lbw(*arguments, "--set", "train.stepz=3").refusal().startswith("rank 1: train.stepz: unknown key")


def test_the_command_tells_of_a_lost_rank_in_one_line(tmp_path, small):
    """Without a launcher that ends them all: what torchrun's agent would not let us see."""
    out, port = tmp_path / "out", free_port()
    settings = ("train.steps=1000000", "train.checkpoint_every=5", "train.eval_every=0")
    command = [sys.executable, "-m", "lbw_rl", "run", "mini-qwen2", *small, "--out", str(out)]
    command += [part for setting in settings for part in ("--set", setting)]
    told_by = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **told_by, "RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        until(lambda: list(out.glob("checkpoints/step-*")), "a checkpoint")
        processes[1].kill()
        errors = processes[0].communicate(timeout=60)[1].splitlines()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [line for line in errors if not line.startswith("mini-qwen2 · ")]  # progress
    assert len(said) == 1, errors
    assert said[0].startswith("lbw-rl: ")
    assert "rank 0 of 2 stops" in said[0]
    assert said[0].endswith("; the same command with --resume goes on from the last checkpoint")
    assert processes[0].returncode == 1


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path, small):
    out = tmp_path / "out"
    done = torchrun("run", "mini-qwen2", *small, "--set", "train.parallel=fsdp", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "summary.json").read_text())  # printed once
    assert done.stderr.count("mini-qwen2 · constant: 6/6 ") == 1


def test_a_bad_recipe_is_told_once_under_torchrun(tmp_path):
    done = torchrun("run", "mini-qwen2", "--set", "train.stepz=3", "--out", tmp_path / "out")
    assert done.returncode != 0  # torchrun's own; it tells those of the ranks
    told_by_us = [line for line in done.stderr.splitlines() if line.startswith("lbw-rl: ")]
    assert len(told_by_us) == 1
    assert told_by_us[0].startswith("lbw-rl: train.stepz: unknown key; did you mean train.steps?")
    assert "exitcode  : 2 " in done.stderr
    assert f"exitcode  : {signal.SIGKILL} " not in done.stderr
    assert not (tmp_path / "out").exists()
