"""The documents say what the code does."""

import re
from pathlib import Path

import pytest
import torch

from lbw_rl.training_runs.reference import metrics_reference, reference

ROOT = Path(__file__).parent.parent


def test_the_references_are_the_generated_ones():
    """docs/signals.md and docs/metrics.md are what `python -m lbw_rl.training_runs.reference docs` writes."""
    assert (ROOT / "docs/signals.md").read_text(encoding="utf-8") == reference()
    assert (ROOT / "docs/metrics.md").read_text(encoding="utf-8") == metrics_reference()


def test_every_local_link_of_the_documents_leads_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{document.name}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert not broken


def _example(number):
    """The README's n-th Python block."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[number]


@pytest.fixture
def tiny_qwen2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=64, num_key_value_heads=2, **shape))


def test_the_plain_example_runs(tiny_qwen2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer = torch.optim.AdamW(tiny_qwen2.parameters(), lr=1e-3)
    names = {"model": tiny_qwen2, "optimizer": optimizer, "x": torch.randint(0, 64, (2, 8))}
    exec(_example(0), names)
    assert names["governor"].summary()["decisions"] == 1
    assert (tmp_path / "run/ledger.jsonl").is_file()
    names["governor"].close()


def test_the_trainer_example_runs(tiny_qwen2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformers = pytest.importorskip("transformers")
    data = [{"input_ids": torch.arange(8) % 64, "labels": torch.arange(8) % 64}] * 8
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    names = {"Trainer": transformers.Trainer, "model": tiny_qwen2, "args": args, "data": data}
    exec(_example(1), names)
    assert names["governance"].governor.summary()["decisions"] == 3
    assert len((tmp_path / "run/ledger.jsonl").read_text().splitlines()) == 4  # and a header


# ---- docs/integrations.md

NOT_RUN_HERE = {"Several processes": "needs processes that torchrun starts"}


def _loop_examples():
    """Heading → its Python block."""
    sections = re.split(r"^## ", (ROOT / "docs/integrations.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    blocks = {}
    for section in sections:
        found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert len(found) <= 1, "one example per section"
        if found:
            blocks[section.partition("\n")[0]] = found[0]
    return blocks


LOOP_EXAMPLES = _loop_examples()


class Batches(torch.utils.data.Dataset):
    """A few rows of token ids that are their own labels."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = (torch.arange(8) + index) % 64
        return {"input_ids": row, "labels": row}


@pytest.fixture
def loop_names(tiny_qwen2):
    """What the examples take for granted."""
    data = Batches()
    return {"model": tiny_qwen2, "data": data, "loader": torch.utils.data.DataLoader(data, batch_size=2)}


def _prepare(heading, names):
    """Sees to what an example needs besides, or skips where its library is missing."""
    if heading == "Accelerate":
        state = pytest.importorskip("accelerate").state  # its settings are singletons; other tests leave theirs
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    elif heading == "Hugging Face Trainer":
        pytest.importorskip("accelerate")
    elif heading == "Lightning":
        lightning = pytest.importorskip("lightning")

        class Module(lightning.LightningModule):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def training_step(self, batch, batch_idx):
                return self.model(**batch).loss

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-3)

        names["module"] = Module(names["model"])


def test_every_loop_has_an_example():
    loops = ["Plain PyTorch", "Accelerate", "Hugging Face Trainer", "Lightning", "Several processes"]
    stages = ["Handing over authority in stages", "Snapshots and rollback", "Resuming"]
    assert list(LOOP_EXAMPLES) == loops + stages


@pytest.mark.parametrize("heading", LOOP_EXAMPLES)
def test_the_example_of_every_loop_runs(heading, loop_names, tmp_path, monkeypatch):
    if heading in NOT_RUN_HERE:
        compile(LOOP_EXAMPLES[heading], heading, "exec")
        pytest.skip(NOT_RUN_HERE[heading])
    monkeypatch.chdir(tmp_path)
    _prepare(heading, loop_names)
    before = [p.clone() for p in loop_names["model"].parameters()]
    exec(LOOP_EXAMPLES[heading], loop_names)
    governor = loop_names["governor"] if "governor" in loop_names else loop_names["governance"].governor
    summary = governor.summary()
    decisions = {"Accelerate": 2, "Lightning": 2, "Resuming": 0}
    assert summary["decisions"] == decisions.get(heading, 4)
    assert not summary["faults"]
    assert not governor.optimizer._optimizer_step_pre_hooks  # let go
    moved = any(not torch.equal(a, b.cpu()) for a, b in zip(before, loop_names["model"].parameters()))
    assert moved == (heading != "Resuming")
    assert (tmp_path / "run/ledger.jsonl").is_file() == ("ledger=" in LOOP_EXAMPLES[heading])


def test_every_test_that_the_table_names_exists():
    table = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8").split("## What works where")[1]
    named = {name for name in re.findall(r"`([a-z_]+)(?:\[[^\]]+\])?`", table) if len(name) > 25}
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) >= 28
    assert [name for name in sorted(named) if f"def test_{name}(" not in sources] == []


# ---- docs/monitoring.md


def test_the_example_of_monitoring_runs(loop_names, tmp_path, monkeypatch):
    pytest.importorskip("prometheus_client")
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/monitoring.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(block.replace("PrometheusExporter(9464)", "PrometheusExporter(0)"), loop_names)  # the port may be in use here
    assert loop_names["governor"].summary()["decisions"] == 4
    assert not loop_names["governor"].summary()["faults"]
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1


# ---- docs/guide.md


def test_the_example_of_proxy_fleets_runs():
    pytest.importorskip("stable_baselines3")
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "FleetVecEnv" in b)
    names = {}
    exec(block.replace("Env(32", "Env(2"), names)
    assert len(names["env"].reset()) == 3 * 2
    assert names["judge"].num_envs == len(names["judge"].reset(seed=0)[0]) == 2
    names["env"].close()
