"""A full disk under a whole command: what the run cannot do without is told in one line, and a resume goes on."""

import json

import pytest
from full_disk import disk_of

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")


def test_a_model_that_the_disk_does_not_take_is_told_in_one_line_and_resumed(lbw, small, tmp_path):
    """safetensors hides the system's error in the text of its own."""
    out = tmp_path / "out"
    arguments = ["run", "mini-qwen2", "--controller", "lbw-guard", *small, "--out", out, "--resume"]
    with disk_of(20_000):  # the model has 26,000 bytes
        answer = lbw(*arguments)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.splitlines()[-1] == (
        f"lbw-rl: File too large at {out / 'model.tmp'}; with more room, the same command with --resume goes on where it stopped"
    )
    assert sorted(p.name for p in out.iterdir()) == ["ledger.jsonl", "metrics.jsonl", "recipe.json"]
    assert lbw(*arguments).code == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 6
    assert (out / "model/model.safetensors").is_file()


def test_a_disk_that_takes_nothing_at_all_is_told_in_one_line(lbw, small, tmp_path):
    with disk_of(1000):  # less than the recipe
        answer = lbw("run", "mini-qwen2", *small, "--out", tmp_path / "out")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("lbw-rl: File too large; with more room, ")
    assert answer.err.count("\n") == 1
