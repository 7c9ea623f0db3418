"""Governed runs over real processes: torchrun, gloo, DDP and FSDP2, against the same run in one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lbw_rl.entropy import ESTIMATORS

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.slow


RUNS = {
    ("single", 1): ["plain", "accumulated", "hand-over", "entropy"],
    ("ddp", 2): [
        *("plain", "nan-loss", "rollback", "resumed", "ungoverned", "idle", "accumulated"),
        *("disagreement", "kill-switch", "slow-rank", "late", "late-nan-loss", "between", "hand-over"),
        "entropy",
    ],
    ("ddp", 4): ["plain", "entropy"],
    ("fsdp", 2): ["plain", "nan-loss", "rollback", "resumed", "ungoverned", "idle"],
    ("fsdp-llama", 2): ["plain", "accumulated", "hand-over", "entropy"],
    ("fsdp", 4): ["plain", "nan-loss"],
    ("hsdp", 4): ["plain"],
}
"""(kind, ranks) → scenarios, run one after the other by the same processes."""


def launch(out, kind, scenarios, ranks):
    command = [sys.executable]
    if kind != "single":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = [str(WORKER), kind, ",".join(scenarios), str(out)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(kind, scenario, ranks) → its folder; each group of processes is started once."""
    folders = {}

    def run(kind, scenario="plain", ranks=1):
        key = kind, ranks
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(f"{kind}{ranks}")
            done = launch(folders[key], kind, RUNS[key], ranks)
            assert done.returncode == 0, done.stderr[-3000:]
        return folders[key] / scenario

    return run


def decisions(folder, rank=0):
    name = "ledger.jsonl" if rank == 0 else f"ledger.rank{rank}.jsonl"
    return [r for line in (folder / name).read_text().splitlines() if (r := json.loads(line))["type"] == "decision"]


def events(folder, rank=0):
    return json.loads((folder / f"events.{rank}.json").read_text())


KINDS = [
    *(("ddp", 2, "plain"), ("ddp", 4, "plain"), ("ddp", 2, "late")),
    *(("fsdp", 2, "plain"), ("fsdp", 4, "plain"), ("hsdp", 4, "plain")),
]


@pytest.mark.parametrize(("kind", "ranks", "scenario"), KINDS)
def test_every_rank_decides_alike_on_one_collective_per_decision(finished, kind, ranks, scenario):
    folder = finished(kind, scenario, ranks)
    digests = [[d["digest"] for d in decisions(folder, rank)] for rank in range(ranks)]
    assert all(d == digests[0] for d in digests)
    assert len(digests[0]) == 24
    assert events(folder)["summary"]["faults"] == {}


@pytest.mark.parametrize(
    ("kind", "ranks", "scenario"),
    [
        *(("ddp", 2, "plain"), ("ddp", 4, "plain"), ("fsdp-llama", 2, "plain"), ("hsdp", 4, "plain")),
        *(("ddp", 2, "accumulated"), ("fsdp-llama", 2, "accumulated")),
    ],
)
def test_ranks_together_see_and_decide_what_one_process_over_the_joined_batch_does(finished, kind, ranks, scenario):
    """Losses read from the model's output, norms before the clipping of every other step, two micro-batches a step."""
    one, many = decisions(finished("single", scenario)), decisions(finished(kind, scenario, ranks))
    for a, b in zip(one, many, strict=True):
        seen = {k: v for k, v in a["telemetry"].items() if v is not None}
        # Sums over ranks are taken in another order: rounding grows with the steps.
        assert {k: b["telemetry"][k] for k in seen} == pytest.approx(seen, rel=2e-3, abs=1e-4), a["step"]
        assert b["executed"]["lr_scale"] == pytest.approx(a["executed"]["lr_scale"], rel=2e-3)
        assert b["regime"] == a["regime"]
    weights = [
        torch.load(f / "weights.pt", weights_only=True)
        for f in (finished("single", scenario), finished(kind, scenario, ranks))
    ]
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("ddp", 4), ("fsdp-llama", 2)])
def test_the_entropy_of_the_ranks_is_that_of_one_process_over_the_joined_batch(finished, kind, ranks):
    one, many = decisions(finished("single", "entropy")), decisions(finished(kind, "entropy", ranks))
    for a, b in zip(one, many, strict=True):
        for name, (signal, _) in ESTIMATORS.items():
            expected, measured = a["telemetry"][signal], b["telemetry"][signal]
            # The histogram jumps by about 1e-4 where rounding takes an element over the edge of a bin.
            assert measured == pytest.approx(expected, abs=1e-3 if name == "histogram" else 1e-6), (name, a["step"])
        assert b["telemetry"]["group_grad_entropy"] == pytest.approx(a["telemetry"]["group_grad_entropy"], abs=1e-6)
        assert b["telemetry"]["collective_seconds"] > 0
    direction = [d["telemetry"]["grad_entropy_direction"] for d in many]
    assert direction[0] is None
    assert None not in direction[1:]


@pytest.mark.parametrize("kind", ["ddp", "fsdp-llama"])
def test_ranks_hand_over_to_sgd_together_and_hold_the_same_weights(finished, kind):
    """Six steps of AdamW, SGD, a rollback to before it, AdamW, SGD, AdamW; as one process over the joined batch."""
    one, many = finished("single", "hand-over"), finished(kind, "hand-over", 2)
    assert events(many, 0)["bits"] == events(many, 1)["bits"]
    assert [d["digest"] for d in decisions(many, 0)] == [d["digest"] for d in decisions(many, 1)]
    for folder in (one, many):
        handed_over = [d["step"] for d in decisions(folder) if d["executed"].get("hand_over")]
        assert handed_over == [11, 12, 14, *range(17, 22)]
        assert events(folder)["summary"]["faults"] == {}
        assert events(folder)["summary"]["rollbacks"] == 1
    rates = [[d["sgd_rate"] for d in decisions(folder) if "sgd_rate" in d] for folder in (one, many)]
    assert rates[1] == pytest.approx(rates[0], rel=2e-2)
    weights = [torch.load(folder / "weights.pt", weights_only=True) for folder in (one, many)]
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_a_rank_whose_loss_is_nan_makes_all_skip_together_and_is_named(finished, kind, ranks):
    folder = finished(kind, "nan-loss", ranks)
    for rank in range(ranks):
        assert events(folder, rank)["unchanged"] == [12]
        skipped = decisions(folder, rank)[12]
        assert skipped["executed"]["directive"] == "skip"
        assert skipped["nonfinite_ranks"] == [ranks - 1]
    assert all(w.isfinite().all() for w in torch.load(folder / "weights.pt", weights_only=True))


def test_late_ranks_withhold_a_poisoned_update_on_all_devices_and_learn_whose_it_was(finished):
    """The loss of the last rank is NaN at step 12: each rank withholds by the joined gradient, step 13 names the rank."""
    folder = finished("ddp", "late-nan-loss", 2)
    for rank in range(2):
        assert events(folder, rank)["finite"]
        told = decisions(folder, rank)[13]
        assert (told["nonfinite_ranks"], told["withheld_on_device"]) == ([1], True)
    assert decisions(folder)[-1]["digest"] == decisions(folder, 1)[-1]["digest"]


def test_between_two_decisions_every_rank_withholds_the_same_step(finished):
    """Decisions every five steps; the gradient of step 7 is not finite on any rank."""
    folder = finished("ddp", "between", 2)
    assert [events(folder, rank)["unchanged"] for rank in range(2)] == [[7], [7]]
    assert [events(folder, rank)["summary"]["skips"] for rank in range(2)] == [1, 1]
    assert decisions(folder)[-1]["digest"] == decisions(folder, 1)[-1]["digest"]


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2)])
def test_ranks_roll_back_together(finished, kind, ranks):
    folder = finished(kind, "rollback", ranks)
    records = [decisions(folder, rank) for rank in range(ranks)]
    for record in records:
        assert record[12]["executed"]["directive"] == "rollback"
        assert (record[12]["restored_step"], record[12]["lost_steps"]) == (10, [10, 12])
        # The loss returns to that of the weights of step 10, on other data.
        assert record[13]["telemetry"]["learning_rate"] == pytest.approx(record[11]["telemetry"]["learning_rate"])
    assert records[0][-1]["digest"] == records[1][-1]["digest"]
    assert events(folder)["summary"]["rollbacks"] == 1


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2)])
@pytest.mark.parametrize(("other", "reference"), [("idle", "ungoverned"), ("resumed", "plain")])
def test_idle_is_ungoverned_and_resumed_is_uninterrupted_bit_for_bit(finished, kind, ranks, other, reference):
    a, b = (
        torch.load(finished(kind, scenario, ranks) / "weights.pt", weights_only=True) for scenario in (other, reference)
    )
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    if other == "resumed":
        last = [decisions(finished(kind, scenario, ranks))[-1] for scenario in (other, reference)]
        assert last[0] == last[1]


def test_a_slow_rank_is_waited_for_and_the_wait_is_measured(finished):
    """Rank 1 sleeps for a second before its steps 5 and 6: rank 0 waits in the collective, and its ledger says so."""
    seconds = [d["telemetry"]["collective_seconds"] for d in decisions(finished("ddp", "slow-rank", 2))]
    assert len(seconds) == 24
    assert min(seconds[5:7]) > 0.5


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_dead_rank_is_a_clear_error_within_the_stated_time(tmp_path, how):
    """SIGKILL closes the connection; SIGSTOP leaves it silent, and the time-out of 5 s decides."""
    out = tmp_path / how
    out.mkdir()
    environment = _environment()
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "alone-under-gloo", "dead-rank", str(out)],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    try:
        processes[0].wait(timeout=120)
        name, message, seconds = json.loads((out / "dead-rank" / "error.0.json").read_text())
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert name == "PeerLostError"
    assert "governance at step 8: a rank is gone, or was silent for 5 s; rank 0 of 2 stops here" in message
    assert seconds < 60  # five are stated; a busy machine may take its time to say so


def _environment():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_ranks_that_were_set_up_differently_are_told_so(tmp_path):
    done = launch(tmp_path, "ddp", ["differing-settings"], 2)
    assert done.returncode != 0
    assert "ValueError: context: the ranks differ" in done.stderr


def test_a_rank_that_decides_otherwise_suspends_the_controller_on_all(finished):
    folder = finished("ddp", "disagreement", 2)
    for rank in range(2):
        summary = events(folder, rank)["summary"]
        assert summary["suspended"]
        assert summary["faults"] == {"ranks": 1}
        assert decisions(folder, rank)[-1]["regime"] == "suspended"


def test_a_control_file_and_a_kill_signal_on_one_rank_reach_all_at_the_same_step(finished):
    """Rank 0's control file says `skip` at step 6; the last rank gets SIGUSR1 at step 12."""
    folder = finished("ddp", "kill-switch", 2)
    for rank in range(2):
        name = "ledger.jsonl" if rank == 0 else "ledger.rank1.jsonl"
        records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        modes = [(r["step"], r["from"], r["to"]) for r in records if r["type"] == "mode"]
        assert modes == [(6, "govern", "skip"), (12, "skip", "off")]
        assert [d["executed"]["lr_scale"] for d in decisions(folder, rank)[6:]] == [1.0] * 6
        assert events(folder, rank)["mode"] == "off"
