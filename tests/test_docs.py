"""The documents say what the code does."""

import re
from pathlib import Path

import pytest
import torch

from lbw_rl.training_runs.reference import reference

ROOT = Path(__file__).parent.parent


def test_the_signal_reference_is_the_generated_one():
    """docs/signals.md is what `python -m lbw_rl.training_runs.reference docs/signals.md` writes."""
    assert (ROOT / "docs/signals.md").read_text(encoding="utf-8") == reference()


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


def test_the_trainer_example_runs(tiny_qwen2, tmp_path):
    transformers = pytest.importorskip("transformers")
    data = [{"input_ids": torch.arange(8) % 64, "labels": torch.arange(8) % 64}] * 8
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    names = {"Trainer": transformers.Trainer, "model": tiny_qwen2, "args": args, "data": data}
    exec(_example(1), names)
    assert names["governance"].governor.summary()["decisions"] == 3
