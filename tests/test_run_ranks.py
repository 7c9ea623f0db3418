"""A recipe on several ranks: real processes, gloo, DDP and FSDP2, against the same recipe in one process."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lbw_rl.envs.recipe import load_recipe, override
from lbw_rl.training_runs.run import run

safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
pytest.importorskip("peft", reason="needs the extra lbw-rl[hf]")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX alone")

WORKER = Path(__file__).with_name("rank_worker.py")
STEPS = 10


@pytest.fixture(scope="module")
def recipe(tiny):
    """Makes a recipe of ten steps of four micro-batches of three rows, with clipping, checkpoints and held-out text.

    Nothing of it is a multiple of the number of ranks but what must be: five rows of held-out text, uneven shards. Each of
    two ranks reads two micro-batches of three rows.
    """

    def make(*overrides):
        settings = [
            *("model.num_layers=2", f"train.steps={STEPS}", "train.batch_size=3", "train.accumulation=4"),
            *("train.checkpoint_every=3", "train.measure_device=false", "data.eval_sequences=5"),
            *("data.vocab_size=301", "model.intermediate_size=33", "optimizer.grad_clip=1.0"),
            *("authority.max_rollbacks=1", "authority.snapshot_every=4"),
        ]
        return override(load_recipe("mini-qwen2"), [*tiny, *settings, *overrides])

    return make


GUARDED = ("controller.name=lbw-guard", "train.lr_multiplier=10")


def _ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The same recipes in this process: with and without LBW-Guard."""
    from rank_worker import Witness

    folder = tmp_path_factory.mktemp("alone")
    run(recipe(), folder / "plain")
    run(recipe(*GUARDED), folder / "guarded", controller=Witness())
    return folder


def adapters(alone):
    """Settings of LoRA on the model that `plain` ended with."""
    return (f"model.path={alone / 'plain/model'}", "data.tokenizer=model", "model.lora_rank=2")


SCHEDULE_FREE = ("optimizer.name=schedule-free", "schedule.name=constant")


@pytest.fixture(scope="module")
def ranks(recipe, alone, tmp_path_factory):
    """The folder in which two ranks have done all the jobs of this module, one after the other."""
    folder = tmp_path_factory.mktemp("ranks")

    def job(name, *overrides, kind="train", **arguments):
        return {
            name: (kind, {"out": str(folder / name), "recipe": recipe(*overrides).model_dump(mode="json"), **arguments})
        }

    jobs = {"agree": ("agree", {}), "adapt-ddp": ("adapt", {"how": "ddp"}), "adapt-fsdp": ("adapt", {"how": "fsdp"})}
    for how in ("ddp", "fsdp"):
        parallel = f"train.parallel={how}"
        guarded = (parallel, *GUARDED)
        jobs |= job(f"plain-{how}", parallel)
        jobs |= job(f"guarded-{how}", *guarded, witness=True)
        jobs |= job(f"killed-{how}", *guarded, witness=True, die=[[0, 1], 7])
        jobs[f"again-{how}"] = (
            "train",
            {**jobs[f"killed-{how}"][1], "die": None, "resume": True, "out": str(folder / f"killed-{how}")},
        )
        jobs |= job(f"left-{how}", *guarded, die=[[0, 1], 7])  # for another number of ranks
        lora = (parallel, *adapters(alone))
        jobs |= job(f"lora-{how}", *lora, die=[[0, 1], 7])
        jobs[f"lora-again-{how}"] = ("train", {**jobs[f"lora-{how}"][1], "die": None, "resume": True})
        jobs |= job(f"schedule-free-{how}", parallel, *SCHEDULE_FREE)
    jobs |= job("plateau", "schedule.name=plateau", "optimizer.adaptive_clip=zclip", die=[[0, 1], 7])
    jobs |= job("bf16-fsdp", "train.parallel=fsdp", "model.dtype=bfloat16")
    jobs |= job("lost", "train.parallel=ddp", die=[[1], 4])
    jobs |= job("lost-fsdp", "train.parallel=fsdp", die=[[1], 4])
    jobs |= job("in-use", "train.parallel=ddp", resume=False)
    (folder / "in-use").mkdir()
    (folder / "in-use/file").write_text("somebody else's")
    jobs |= job("uneven", "train.batch_size=3", "train.accumulation=1")
    ports = _ports(len(jobs))
    plan = folder / "jobs.json"
    plan.write_text(json.dumps({n: (k, p, str(folder), a) for (n, (k, a)), p in zip(jobs.items(), ports, strict=True)}))
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(plan)],
            env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
            stderr=(folder / f"stderr.{r}").open("w"),
        )
        for r in range(2)
    ]
    try:
        for process in processes:
            process.wait(timeout=240)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


def told(folder, name, rank):
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def answer(folder, name, rank=0):
    said = told(folder, name, rank)
    assert "answer" in said, said
    return said["answer"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(folder / "metrics.jsonl")]


def weights(folder, file="model"):
    return safetensors_torch.load_file(folder / f"model/{file}.safetensors")


def assert_close(one, other, tolerance, file="model"):
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert (a.pop("eval_loss") or 0.0) == pytest.approx(b.pop("eval_loss") or 0.0, rel=tolerance)
        assert a == pytest.approx(b, rel=tolerance)
    assert weights(one, file).keys() == weights(other, file).keys()
    for name, weight in weights(one, file).items():
        torch.testing.assert_close(weight, weights(other, file)[name], rtol=20 * tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["plain", "guarded"])
def test_ranks_train_what_one_process_does(ranks, alone, kind, how):
    """Several micro-batches a step, clipping at the norm of all, 5 held-out rows: losses, rates and weights are those of one."""
    assert_close(alone / kind, ranks / f"{kind}-{how}", 1e-4)
    rates = [line["lr"] for line in metrics(alone / "guarded")]
    assert rates != [line["lr"] for line in metrics(alone / "plain")]  # there was something to govern


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_only_the_first_rank_writes_and_all_decide_alike(ranks, alone, how):
    name = f"guarded-{how}"
    assert sorted(p.name for p in (ranks / name).iterdir()) == sorted(p.name for p in (alone / "guarded").iterdir())
    ledger = lines(ranks / name / "ledger.jsonl")
    assert [r.get("step") for r in ledger] == [None, *range(STEPS)]
    first, second = (answer(ranks, name, rank) for rank in range(2))
    assert first == second
    assert [a[0] for a in first["answers"]] == list(range(STEPS))
    assert [a[2] for a in first["answers"]] == [r["proposed"]["lr_scale"] for r in ledger[1:]]
    assert first["summary"]["governor"]["faults"] == {}
    assert first["summary"]["rollbacks"] == 1
    assert first["summary"] == json.loads((ranks / name / "summary.json").read_text())


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_killed_and_resumed_ranks_end_with_the_bits_of_the_uninterrupted(ranks, how):
    """Both are killed after step 7; the checkpoint of step 6 holds the state of step 4 that step 7 rolls back to."""
    straight, resumed = ranks / f"guarded-{how}", ranks / f"killed-{how}"
    assert not (ranks / f"killed-{how}.0.json").exists()
    assert answer(ranks, f"again-{how}")["answers"][0][0] == 6
    assert lines(straight / "ledger.jsonl")[8]["restored_step"] == 4
    assert lines(resumed / "ledger.jsonl") == lines(straight / "ledger.jsonl")
    assert metrics(resumed) == metrics(straight)
    assert weights(resumed).keys() == weights(straight).keys()
    assert all(torch.equal(w, weights(straight)[name]) for name, w in weights(resumed).items())


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_what_two_ranks_left_one_process_goes_on_with(ranks, recipe, tmp_path, how):
    """To rounding, but for what is cut by rank: after FSDP2 the first decision misses the signals of one update."""
    folder = tmp_path / "left"
    shutil.copytree(ranks / f"left-{how}", folder)
    summary = run(recipe(f"train.parallel={how}", *GUARDED), folder, resume=True)
    assert [r.get("step") for r in lines(folder / "ledger.jsonl")] == [None, *range(STEPS)]
    assert summary["governor"]["faults"] == {}
    straight = tmp_path / "straight"
    run(recipe(*GUARDED), straight)
    if how == "ddp":
        assert_close(straight, folder, 1e-4)
    else:
        losses = [[line["loss"] for line in metrics(f)] for f in (straight, folder)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_bfloat16_is_trained_in_shards(ranks, recipe, tmp_path):
    """Gradients are averaged in float32; rounding to bfloat16 is all that differs."""
    run(recipe("model.dtype=bfloat16"), tmp_path / "one")
    losses = [[line["loss"] for line in metrics(f)] for f in (tmp_path / "one", ranks / "bf16-fsdp")]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert {w.dtype for w in weights(ranks / "bf16-fsdp").values()} == {torch.bfloat16}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_frozen_weights_and_adapters_share_a_group(ranks, how):
    from rank_worker import adapt

    expected = adapt("ddp")
    for rank in range(2):
        losses = answer(ranks, f"adapt-{how}", rank)
        for a, b in zip(expected, losses, strict=False):
            assert b == pytest.approx(a, rel=2e-3)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_adapters_are_trained_killed_and_resumed_as_by_one_process(ranks, alone, recipe, tmp_path, how):
    """The checkpoint holds the adapters alone, and the frozen weights are those of the folder."""
    run(recipe(*adapters(alone)), tmp_path / "one")
    assert answer(ranks, f"lora-again-{how}")["summary"]["steps"] == STEPS
    assert_close(tmp_path / "one", ranks / f"lora-{how}", 1e-4, "adapter_model")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_averaged_weights_of_ranks_are_evaluated_and_saved(ranks, recipe, tmp_path, how):
    run(recipe(*SCHEDULE_FREE), tmp_path / "one")
    assert_close(tmp_path / "one", ranks / f"schedule-free-{how}", 1e-4)


def test_a_schedule_that_answers_to_the_loss_hears_that_of_all_ranks(ranks):
    """What it remembers at step 6 is the exponential mean of the losses reported since its two steps of warmup."""
    (newest,) = (ranks / "plateau/checkpoints").glob("step-00000006-*")
    first, *later = [line["loss"] for line in metrics(ranks / "plateau")[2:6]]
    for loss in later:
        first += 0.1 * (loss - first)
    scheduler = torch.load(newest, weights_only=True)["state"]["task"]["scheduler"]
    assert scheduler["mean"] == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize("name", ["lost", "lost-fsdp"])
def test_a_rank_that_dies_ends_the_other(ranks, name):
    """In a collective that is not ours: DDP's of gradients, FSDP's of weights."""
    said = told(ranks, name, 0)
    assert said["error"] == "PeerLostError"
    assert re.fullmatch(
        r"rank 0 of 2 stops, since another one is gone, or was silent for too long \(.*[Cc]onnection .* by peer.*\)",
        said["message"],
    )
    assert "gloo/" not in said["message"]  # gloo's own source files
    assert not (ranks / name / "summary.json").exists()
    assert not (ranks / f"{name}.1.json").exists()


def test_what_one_rank_cannot_use_all_refuse(ranks):
    for rank in range(2):
        said = answer(ranks, "agree", rank)
        assert said[0] == "ValueError: corpus: rank 1 has none; accepted: one"
        assert said[1] == said[2] == "ValueError: corpus: rank 0 has none; accepted: one"
        assert said[3].split(":")[0] in ("KeyError", "RuntimeError")
        assert said[4:8] == [1, rank, [0, 1], [0, 1] if rank == 0 else []]
        assert said[8:] == [0.5, [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]][rank]]
    refused = [told(ranks, "uneven", rank) for rank in range(2)]
    assert refused[0] == refused[1]
    assert refused[0]["message"] == (
        "train.batch_size: 3 × train.accumulation 1 = 3 sequences a step cannot be shared evenly by 2 ranks; "
        "accepted: a multiple of 2"
    )
    occupied = [told(ranks, "in-use", rank) for rank in range(2)]
    assert occupied[0] == occupied[1]  # the second rank has never looked at the folder
    assert "is not empty; accepted: a new or empty folder, or --resume" in occupied[0]["message"]
    assert [p.name for p in (ranks / "in-use").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.name=adafactor", "optimizer.name: 'adafactor' does not know of tensors that are sharded"),
        ("optimizer.adaptive_clip=zclip", "optimizer.adaptive_clip: 'zclip' does not know of gradients"),
    ],
)
def test_what_sums_over_a_tensor_does_not_go_with_shards(recipe, setting, message):
    from lbw_rl.envs.ranks import Ranks

    Ranks(1, 2, 1).check(recipe(setting))
    with pytest.raises(ValueError, match=f"^{message}.*; accepted: .*train.parallel = 'ddp'$"):
        Ranks(1, 2, 1).check(recipe(setting, "train.parallel=fsdp"))
