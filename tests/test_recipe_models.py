"""`model.path = "recipe:NAME"`: trained once, kept whole or not at all, by one process however many want it."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest
import torch

from lbw_rl.envs import recipe_models
from lbw_rl.envs.corpus import load_corpus
from lbw_rl.envs.recipe import RecipeError, known_recipes, load_recipe, override
from lbw_rl.envs.recipe_models import model_folder, recipe_of
from lbw_rl.envs.task import TrainingTask

pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
load_file = pytest.importorskip("safetensors.torch").load_file


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("LBW_RL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tiny, tmp_path):
    """Writes the recipe of a small model; returns the file and the `model.path` that names it."""

    def write(*more: str, name: str = "small") -> str:
        recipe = override(load_recipe("mini-qwen2"), [*tiny, f"name={name}", *more])
        values = recipe.model_dump(mode="json", exclude={"authority", "controller"}, exclude_none=True)
        lines = [f"name = {json.dumps(values.pop('name'))}"]
        for section, fields in values.items():
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items())]
        (tmp_path / f"{name}.toml").write_text("\n".join(lines))
        return f"recipe:{tmp_path / name}.toml"

    return write


def said(caplog, what: str) -> int:
    return sum(what in record.getMessage() for record in caplog.records)


def test_it_is_the_ungoverned_run_of_the_recipe_kept_once(base, cache, caplog):
    path = base()
    threads = torch.get_num_threads()
    folder = Path(model_folder(path))
    assert torch.get_num_threads() == threads
    assert folder.parent == cache / "models"
    assert folder.name.startswith("small-")
    assert sorted(p.suffix for p in folder.parent.iterdir() if p != folder) == [".lock"]
    task = TrainingTask(recipe_of(path))
    while task.step < task.total_steps:
        task.backward()
        task.advance()
    kept = load_file(folder / "model.safetensors")
    assert kept
    assert all(torch.equal(kept[name], task.model.state_dict()[name]) for name in kept)
    origin = json.loads((folder / "training.json").read_text())
    assert origin["held_out_loss"] == task.evaluate()
    assert origin["corpus_sha256"] == task.corpus_sha256

    assert model_folder(path) == str(folder)
    (line,) = [r.getMessage() for r in caplog.records if "pretraining" in r.getMessage()]
    assert line.startswith("pretraining small once: 6 steps, about ")
    assert line.endswith(f"kept in {folder}")


def test_a_run_starts_from_it_with_its_tokenizer(base, tiny, cache):
    path = base()
    of_the_run = [s for s in tiny if not s.startswith(("model.", "data.vocab_size"))]
    recipe = override(load_recipe("mini-llama-full"), [*of_the_run, f"model.path={path}"])
    corpus = load_corpus(recipe.data, path)
    task = TrainingTask(recipe)
    assert corpus.tokenizer.to_str() == task.tokenizer.to_str()
    assert (Path(model_folder(path)) / "tokenizer.json").is_file()
    start = load_file(Path(model_folder(path)) / "model.safetensors")
    assert all(torch.equal(start[name], task.model.state_dict()[name]) for name in start)
    assert len(list((cache / "models").glob("*.lock"))) == 1


def test_a_recipe_may_start_from_the_model_of_another(base, cache, tmp_path):
    first = base()
    lora = tmp_path / "lora.toml"
    of_the_run = (tmp_path / "small.toml").read_text().replace('name = "small"', 'name = "lora"', 1)
    head, _, rest = of_the_run.partition("[model]\n")
    rest = rest[rest.index("[data]") :].replace('"bpe"', '"model"')
    lora.write_text(f'{head}[model]\npath = "{first}"\nlora_rank = 2\n{rest}')
    folder = Path(model_folder(f"recipe:{lora}"))
    assert {p.name.rpartition("-")[0] for p in (cache / "models").iterdir() if p.is_dir()} == {"small", "lora"}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == model_folder(first)
    # A change in the first is a change in the second, though the second's recipe is as it was.
    base("train.seed=1")
    assert Path(model_folder(f"recipe:{lora}")) != folder


def test_whatever_the_model_depends_on_makes_another(base, cache, monkeypatch, tiny, tmp_path):
    folders = {model_folder(base()), model_folder(base("train.steps=5")), model_folder(base("train.seed=1"))}
    text = next(s for s in tiny if s.startswith("data.corpus=")).removeprefix("data.corpus=")
    own = tmp_path / "own.txt"
    own.write_text(Path(text).read_text() + "a little more\n")
    path = base(f"data.corpus={own}")
    folders.add(model_folder(path))
    own.write_text(Path(text).read_text() + "something else, and longer\n")
    folders.add(model_folder(path))
    monkeypatch.setattr(torch, "__version__", "another")
    folders.add(model_folder(base()))
    assert len(folders) == 6


def test_unusable_recipes_are_refused_in_one_line(base, tmp_path, tiny):
    def refusal(path):
        with pytest.raises(RecipeError) as caught:
            model_folder(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    message = refusal("recipe:mini-qwen2-bse")
    assert message.startswith("model.path: 'recipe:mini-qwen2-bse' names no usable recipe; ")
    assert "did you mean 'mini-qwen2-base'?" in message
    for one, other in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{one}.toml").write_text(f'name = "{one}"\n[model]\npath = "recipe:{tmp_path / other}.toml"\n')
    message = refusal(f"recipe:{tmp_path}/a.toml")
    assert "leads back to itself" in message
    assert message.count("→") == 3
    own = override(load_recipe("mini-qwen2"), [*tiny, f"model.path=recipe:{tmp_path}/a.toml"])
    with pytest.raises(RecipeError, match="leads back to itself"):
        TrainingTask(own)
    message = refusal(base("optimizer.lr=1e9", "optimizer.grad_clip=none", name="wild"))
    assert message.startswith("model.path: the training of 'wild' diverged")
    assert [p.suffix for p in (tmp_path / "cache/models").iterdir()] == [".lock"]


def test_what_is_no_recipe_stays_as_it_is(tmp_path):
    for path in (str(tmp_path), "Qwen/Qwen2.5-7B", "~/models/recipe:x"):
        assert model_folder(path) == path
        assert recipe_of(path) is None


def test_a_cache_that_cannot_be_written_says_so(base, monkeypatch, tmp_path):
    path = base()
    monkeypatch.setenv("LBW_RL_CACHE", str(tmp_path / "small.toml"))
    with pytest.raises(ValueError, match=r"cannot be kept in .*\$LBW_RL_CACHE") as caught:
        model_folder(path)
    assert "\n" not in str(caught.value)


def test_a_failure_while_writing_leaves_nothing_under_the_name(base, cache, monkeypatch, caplog):
    path = base()
    with monkeypatch.context() as patch:
        patch.setattr(TrainingTask, "save_pretrained", _fail_half_way)
        with pytest.raises(ValueError, match="No space left"):
            model_folder(path)
    assert [p for p in (cache / "models").iterdir() if p.is_dir() and p.suffix != ".tmp"] == []
    folder = Path(model_folder(path))  # the half-written one is in nobody's way
    assert (folder / "model.safetensors").is_file()
    assert not list(cache.rglob("rubbish"))


def _fail_half_way(self, folder):
    folder.mkdir()
    (folder / "rubbish").write_text("half a model")
    raise OSError(28, os.strerror(28))


# ---- several processes


WANT = "import sys; from lbw_rl.envs.recipe_models import model_folder; print(model_folder(sys.argv[1]))"


def want(path: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WANT, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_that_want_it_at_once_train_it_once(base):
    path = base("train.steps=60")
    answers = [process.communicate(timeout=120) for process in [want(path), want(path)]]
    folders = {out for out, _ in answers}
    assert len(folders) == 1
    assert folders.pop().strip() == model_folder(path)
    assert sum(err.count("pretraining small once") for _, err in answers) == 1


def test_two_threads_that_want_it_at_once_train_it_once(base, caplog):
    path = base("train.steps=30")
    together = threading.Barrier(2)
    got = []

    def ask():
        together.wait()
        got.append(model_folder(path))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2
    assert len(set(got)) == 1
    assert said(caplog, "pretraining small once") == 1


def test_it_waits_for_the_holder_of_the_lock_and_says_so(base, caplog, cache):
    path = base()
    folder = cache / "models" / recipe_models._file_name(recipe_of(path))
    folder.parent.mkdir(parents=True)
    heard = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: heard.set() if "waiting for another process" in record.getMessage() else None
    recipe_models.log.addHandler(handler)
    try:
        with filelock.FileLock(f"{folder}.lock"):
            thread = threading.Thread(target=model_folder, args=(path,))
            thread.start()
            assert heard.wait(60)
            assert not folder.exists()
        thread.join()
    finally:
        recipe_models.log.removeHandler(handler)
    assert folder.is_dir()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL")
def test_the_lock_of_a_killed_process_blocks_nobody(base, cache, caplog):
    path = base()
    folder = cache / "models" / recipe_models._file_name(recipe_of(path))
    folder.parent.mkdir(parents=True)
    hold = "import filelock, sys, time; filelock.FileLock(sys.argv[1]).acquire(); print(1, flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", hold, f"{folder}.lock"], stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    (folder.parent / f"{folder.name}.tmp").mkdir()
    (folder.parent / f"{folder.name}.tmp" / "half").write_text("of a model")
    assert model_folder(path) == str(folder)
    assert not (folder / "half").exists()


# ---- the shipped ones


@pytest.mark.parametrize(
    "name", [n for n in known_recipes() if (load_recipe(n).model.path or "").startswith("recipe:")]
)
def test_shipped_recipes_name_shipped_bases_that_read_other_text(name):
    recipe = load_recipe(name)
    base = recipe_of(recipe.model.path)
    assert base.name in known_recipes()
    assert base.data.corpus != recipe.data.corpus
    assert recipe.data.tokenizer == "model"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini-qwen2-base", "mini-llama-base"])
def test_the_shipped_bases_learn_their_text(name, caplog):
    origin = json.loads((Path(model_folder(f"recipe:{name}")) / "training.json").read_text())
    assert origin["held_out_loss"] < 4.0  # nats per token; log 1024 = 6.93 before
