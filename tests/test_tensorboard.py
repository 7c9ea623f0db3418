"""Event files, read back with TensorBoard's own reader."""

import json
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("tensorboard", reason="needs the extra lbw-rl[metrics]")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lbw_rl import Governor
from lbw_rl.controllers.entropic import EntroPIC
from lbw_rl.sinks.tensorboard import TensorBoardSink


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def steps_of(events, tag):
    return [event.step for event in events.Scalars(tag)]


class Loop:
    """A governed loop that can stop, and go on from its state."""

    def __init__(self, model, sink, **options):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.governor = Governor(self.optimizer, EntroPIC(warmup=3), sinks=[sink], measure_device=False, **options)
        self.seen = []

    def run(self, steps):
        for _ in range(steps):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.governor.step))
            loss = self.model(x).pow(2).mean()
            loss.backward()
            self.governor.observe(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.seen.append(self.governor.last_telemetry)


def test_every_measured_signal_action_count_and_regime_is_read_back(make_mlp, tmp_path):
    loop = Loop(make_mlp(), TensorBoardSink(tmp_path / "events"))
    loop.run(6)
    loop.governor.close()
    events = read(tmp_path / "events")
    tags = set(events.Tags()["scalars"])
    last = loop.seen[-1].as_dict()
    measured = {f"signals/{name}" for name, value in last.items() if not math.isnan(value)}
    assert measured <= tags
    assert {"executed/lr_scale", "executed/momentum_scale", "proposed/lr_scale", "totals/decisions"} <= tags
    assert {"evidence/entropy", "evidence/target", "regimes/calibrating", "totals/faults"} <= tags
    assert not {f"signals/{name}" for name, value in last.items() if math.isnan(value)} & tags
    assert [e.value for e in events.Scalars("signals/loss")] == pytest.approx([t.loss for t in loop.seen])
    assert steps_of(events, "signals/loss") == list(range(6))
    assert events.Scalars("totals/decisions")[-1].value == 6
    words = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("regime/text_summary")]
    assert words[0] == "calibrating"
    assert len(words) == len([w for i, w in enumerate(words) if i == 0 or words[i - 1] != w])  # where it changes


def test_every_thins_decisions_out(make_mlp, tmp_path):
    loop = Loop(make_mlp(), TensorBoardSink(tmp_path, every=3), decide_every=2)
    loop.run(20)
    loop.governor.close()
    assert steps_of(read(tmp_path), "signals/loss") == [0, 6, 12, 18]


def test_a_resumed_run_hides_what_the_earlier_attempt_wrote_after_the_checkpoint(make_mlp, tmp_path):
    first = Loop(make_mlp(), TensorBoardSink(tmp_path))
    first.run(4)
    state = first.governor.state_dict()
    first.run(6)  # up to step 9, and then it is killed
    first.governor.close()
    resumed = Loop(make_mlp(), TensorBoardSink(tmp_path))
    resumed.governor.load_state_dict(state)
    resumed.run(3)
    resumed.governor.close()
    assert len(list(tmp_path.iterdir())) == 2
    events = read(tmp_path)
    assert steps_of(events, "signals/loss") == list(range(7))
    tail = [e.value for e in events.Scalars("signals/loss")][4:]
    assert tail == pytest.approx([t.loss for t in resumed.seen])


def test_weights_are_the_same_bit_for_bit_with_and_without_event_files(make_mlp, tmp_path):
    weights = []
    for sinks in ([TensorBoardSink(tmp_path)], []):
        model = make_mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with Governor(optimizer, "lbw-guard", model=model, sinks=sinks, measure_device=False) as governor:
            for step in range(10):
                loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).pow(2).mean()
                loss.backward()
                governor.observe(loss)
                optimizer.step()
                optimizer.zero_grad()
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_folder_that_cannot_be_made_costs_the_event_files_alone(make_mlp, tmp_path):
    (tmp_path / "file").write_text("in the way")
    loop = Loop(make_mlp(), TensorBoardSink(tmp_path / "file" / "events"))
    loop.run(2)
    loop.governor.close()
    assert loop.governor.summary()["faults"] == {"tensorboard": 1}
    assert loop.governor.summary()["decisions"] == 2


FULL_DISK = """
import json, logging, resource, sys, torch
from lbw_rl import Governor
from lbw_rl.sinks.tensorboard import TensorBoardSink
logging.basicConfig(stream=sys.stdout)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
governor = Governor(optimizer, "constant", sinks=[TensorBoardSink(sys.argv[1])])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # a file of one page, and the disk is full
for _ in range(100):
    model(torch.ones(4)).sum().backward()
    optimizer.step()
governor.close()
print(json.dumps(governor.summary()))
"""


def test_a_disk_that_takes_no_more_costs_the_event_files_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True, timeout=120
    )
    *logged, summary = done.stdout.splitlines()
    assert json.loads(summary)["decisions"] == 100
    assert set(json.loads(summary)["faults"]) == {"tensorboard"}
    assert len(logged) == 1
    assert "governance fault in tensorboard" in logged[0]


def test_every_below_one_is_refused():
    with pytest.raises(ValueError, match="every: 0 must be at least 1 decision"):
        TensorBoardSink("events", every=0)
