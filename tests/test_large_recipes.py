"""The large recipes, on a tiny model and a tiny WikiText in local folders: the code that they run is that of the mini ones."""

import json
import sys
from pathlib import Path

import pytest
import torch

import lbw_rl
from lbw_rl.envs.recipe import load_recipe, override
from lbw_rl.envs.task import TrainingTask
from lbw_rl.training_runs.run import run

pytest.importorskip("peft", reason="needs the extra lbw-rl[hf]")
datasets = pytest.importorskip("datasets", reason="needs the extra lbw-rl[hf]")
load_file = pytest.importorskip("safetensors.torch").load_file

LARGE = {"qwen2.5-3b": "qwen2", "qwen2.5-7b": "qwen2", "qwen2.5-14b": "qwen2", "tinyllama-1.1b-full": "llama"}
MIRROR = {"qwen2.5-7b": "mini-qwen2-lora", "tinyllama-1.1b-full": "mini-llama-full"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny) -> dict[str, Path]:
    """Architecture → a model's folder as the hub would give it, with its tokenizer; "wikitext" → the data set's."""
    root = tmp_path_factory.mktemp("hub")
    for architecture in ("qwen2", "llama"):
        task = TrainingTask(override(load_recipe(f"mini-{architecture}"), [*tiny, "model.tie_embeddings=false"]))
        task.save_pretrained(root / architecture)
    text = Path(next(s for s in tiny if s.startswith("data.corpus=")).removeprefix("data.corpus=")).read_text()
    (root / "wikitext").mkdir()
    for split, part in (("train", text[:16_000]), ("validation", text[16_000:]), ("test", "unread\n")):
        (root / "wikitext" / f"{split}.txt").write_text(part)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def settings(folders, monkeypatch, tmp_path):
    """Name of a recipe → the settings that make it a run of milliseconds, on local folders."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("LBW_RL_CACHE", str(tmp_path / "cache"))

    def of(name: str) -> list[str]:
        wikitext = [f"data.folder={folders['wikitext']}"] if name in LARGE else []
        return [
            *wikitext,
            f"model.path={folders[LARGE.get(name, 'llama' if 'llama' in name else 'qwen2')]}",
            "data.sequence_length=16",
            "data.eval_sequences=4",
            "train.steps=3",
            "train.batch_size=2",
            "train.threads=1",
            "train.device=cpu",
            "train.measure_device=false",
        ]

    return of


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("model/*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_runs_from_local_folders(name, settings, tmp_path, folders):
    recipe = override(load_recipe(name), [*settings(name), "controller.name=lbw-guard"])
    summary = run(recipe, tmp_path / "out")
    assert (summary["recipe"], summary["steps"], summary["governor"]["faults"]) == (name, 3, {})
    accumulation = load_recipe(name).train.accumulation
    assert accumulation * load_recipe(name).train.batch_size == 16
    assert summary["governor"]["decisions"] == 3
    adapters = tmp_path / "out/model/adapter_config.json"
    if LARGE[name] == "llama":
        assert not adapters.exists()
        assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.float32}
        assert not torch.equal(
            weights(tmp_path / "out")["lm_head.weight"],
            load_file(folders["llama"] / "model.safetensors")["lm_head.weight"],
        )
    else:
        written = json.loads(adapters.read_text())
        assert (written["r"], written["lora_alpha"]) == (16, 32)
        assert written["base_model_name_or_path"] == str(folders["qwen2"])


@pytest.mark.parametrize("name", MIRROR)
def test_a_run_that_died_goes_on_bit_for_bit(name, settings, tmp_path):
    recipe = override(load_recipe(name), [*settings(name), "train.checkpoint_every=1", "optimizer.grad_clip=1.0"])

    class Killed(Exception):
        pass

    def die(done, total, loss):
        if done == 2:
            raise Killed

    run(recipe, tmp_path / "straight")
    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed", progress=die)
    assert not (tmp_path / "killed/summary.json").exists()
    if recipe.model.lora_rank:
        (newest,) = sorted((tmp_path / "killed/checkpoints").iterdir())[-1:]
        state = torch.load(newest, weights_only=True)["state"]["task"]["model"]
        assert all("lora_" in key for key in state)  # the frozen model is not written again and again
    summary = run(recipe, tmp_path / "killed", resume=True)
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert summary["final_loss"] == json.loads((tmp_path / "straight/summary.json").read_text())["final_loss"]


ROOT = Path(lbw_rl.__file__).parent
OF_THE_CORPUS = {"envs/text.py", "envs/corpus.py", "envs/token_cache.py", "envs/extras.py"}  # WikiText or python-docs


def functions_of(action) -> set[str]:
    """The functions of this package that run."""
    seen: set[str] = set()

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            file = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
            seen.add(f"{file}:{frame.f_code.co_qualname}")

    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(previous)
    return seen


@pytest.mark.parametrize(("large", "mini"), MIRROR.items())
def test_a_large_recipe_passes_through_exactly_the_code_of_its_mirror(large, mini, settings, tmp_path):
    def of(name):
        recipe = override(load_recipe(name), [*settings(name), "train.checkpoint_every=2", "controller.name=lbw-guard"])
        run(recipe, tmp_path / f"{name}-warm")  # what happens once in a process has happened
        return functions_of(lambda: run(recipe, tmp_path / name))

    through_large, through_mini = of(large), of(mini)
    differing = {f for f in through_large ^ through_mini if f.split(":")[0] not in OF_THE_CORPUS}
    assert differing == set()
    for needed in ("envs/model.py:build_model", "envs/task.py:TrainingTask.backward", "training_runs/run.py:_train"):
        assert needed in through_large


def test_the_command_runs_a_small_local_folder_without_an_announcement(lbw, settings, tmp_path):
    arguments = [part for setting in settings("qwen2.5-7b") for part in ("--set", setting)]
    answer = lbw("run", "qwen2.5-7b", *arguments, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert "--dry-run" not in answer.err
    assert json.loads(answer.out)["recipe"] == "qwen2.5-7b"
