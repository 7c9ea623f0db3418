import sys
from pathlib import Path

import pytest
import torch

from lbw_rl.envs import corpus as corpus_module
from lbw_rl.envs import token_cache
from lbw_rl.envs.corpus import Batches, CorpusError, held_out_windows, load_corpus
from lbw_rl.envs.recipe import DataSpec
from lbw_rl.envs.text import load_text

pytest.importorskip("tokenizers", reason="needs the extra lbw-rl[hf]")

WIKITEXT = Path(__file__).resolve().parents[1].parent / "shared/data/wikitext2/valid.txt"


def refusal(function, *args) -> str:
    with pytest.raises(CorpusError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)
    return message


@pytest.fixture
def story(tmp_path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("".join(f"line {i}: the fly ate {i * i} grains — grünlich.\n" for i in range(400)), "utf-8")
    return path


def test_python_docs_is_tokenised_reversibly():
    data = DataSpec()
    text, corpus = load_text(data), load_corpus(data)
    assert len(text.train) + len(text.held_out) > 300_000
    assert corpus.vocab_size == 1024
    assert corpus.train.dtype == corpus.held_out.dtype == torch.int64
    assert corpus.train.ndim == 1
    assert int(corpus.train.max()) < 1024
    assert corpus.tokenizer.decode(corpus.train.tolist()) == text.train
    assert corpus.tokenizer.decode(corpus.held_out.tolist()) == text.held_out
    assert corpus.sha256 == text.sha256
    assert load_corpus(data) is corpus  # tokenised once in a process


def test_the_end_of_the_text_is_held_out(story):
    whole = story.read_text("utf-8")
    text = load_text(DataSpec(corpus=str(story), eval_fraction=0.25))
    assert text.train + text.held_out == whole
    assert len(text.held_out) == pytest.approx(0.25 * len(whole), abs=1)


def test_the_tokenizer_never_sees_the_held_out_part(tmp_path):
    path = tmp_path / "split.txt"
    path.write_text("abab " * 2000 + "zq" * 500)
    corpus = load_corpus(DataSpec(corpus=str(path), vocab_size=300, sequence_length=4, eval_fraction=0.15))
    assert corpus.tokenizer.token_to_id("ab") is not None
    assert corpus.tokenizer.token_to_id("zq") is None


def test_a_changed_file_is_read_again(story):
    data = DataSpec(corpus=str(story), vocab_size=300)
    before = load_corpus(data)
    story.write_text(story.read_text("utf-8") + "and then it slept.\n", "utf-8")
    assert load_corpus(data).sha256 != before.sha256


def test_long_texts_are_cut_into_chunks_without_loss():
    text = "a short line\n" * 20_000 + "x" * 200_000 + "\nend"
    chunks = list(corpus_module._chunks(text))
    assert "".join(chunks) == text
    assert max(map(len, chunks)) <= corpus_module._CHUNK


def test_refused_corpora_name_the_field_the_value_and_what_is_accepted(tmp_path):
    message = refusal(load_text, DataSpec(corpus="pyhton-docs"))
    assert message.startswith("data.corpus: 'pyhton-docs' is no known corpus")
    assert "'wikitext-2'" in message
    assert "is a folder" in refusal(load_text, DataSpec(corpus=str(tmp_path)))
    path = tmp_path / "text.txt"
    path.write_bytes(b"good \xff bad")
    assert "not UTF-8 text (byte 0xff at offset 5)" in refusal(load_text, DataSpec(corpus=str(path)))
    for empty in (b"", b" \n\n "):
        path.write_bytes(empty)
        assert "too little text" in refusal(load_text, DataSpec(corpus=str(path)))
    path.write_text("Once upon a time there was a very short text that ended too soon.")
    message = refusal(load_corpus, DataSpec(corpus=str(path), sequence_length=64))
    assert "at least data.sequence_length = 64" in message


def test_a_trimmed_python_says_what_else_there_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "missing from this Python" in refusal(load_text, DataSpec())


def test_missing_packages_name_the_extra(monkeypatch, story):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lbw-rl\[hf\]'"):
        load_corpus(DataSpec(corpus=str(story), vocab_size=301))


def test_a_model_without_a_tokenizer_is_refused(story, tmp_path):
    message = refusal(load_corpus, DataSpec(corpus=str(story), tokenizer="model"), str(tmp_path))
    assert "data.tokenizer: 'model' finds no tokenizer.json" in message
    assert "'bpe'" in message


# ---- cache of tokens on disk


@pytest.fixture
def cached(monkeypatch, tmp_path, story):
    """Loads the story as if in a fresh process with a cache folder; says how often it was tokenised."""
    monkeypatch.setenv("LBW_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus_module, "_CACHE_ABOVE", 0)
    trained = []
    train = corpus_module._train_bpe
    monkeypatch.setattr(corpus_module, "_train_bpe", lambda *args: trained.append(1) or train(*args))

    def load(vocab_size: int = 300):
        corpus_module._load.cache_clear()
        return load_corpus(DataSpec(corpus=str(story), vocab_size=vocab_size)), len(trained)

    yield load
    corpus_module._load.cache_clear()


def same(a, b) -> bool:
    equal = torch.equal(a.train, b.train) and torch.equal(a.held_out, b.held_out)
    return equal and a.tokenizer.to_str() == b.tokenizer.to_str() and a.vocab_size == b.vocab_size


def test_cached_tokens_equal_fresh_ones(cached, tmp_path):
    fresh, trained = cached()
    again, trained_again = cached()
    assert (trained, trained_again) == (1, 1)
    assert same(fresh, again)
    other, trained_other = cached(vocab_size=310)
    assert trained_other == 2
    assert not same(fresh, other)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_damaged_cache_is_made_anew(cached, tmp_path):
    fresh, _ = cached()
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again, trained = cached()
    assert trained == 2
    assert same(fresh, again)
    assert cached()[1] == 2


def test_an_unwritable_cache_costs_time_only(cached, monkeypatch, story):
    monkeypatch.setenv("LBW_RL_CACHE", str(story))  # a file: no folder can be made below it
    assert cached()[1] == 1
    assert cached()[1] == 2


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LBW_RL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert token_cache.cache_folder() == tmp_path / "lbw-rl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert token_cache.cache_folder() == Path.home() / ".cache" / "lbw-rl"


# ---- WikiText through `datasets`


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    module = pytest.importorskip("datasets", reason="needs the extra lbw-rl[hf]")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    return module


def wikitext_rows(split: str) -> list[str]:
    return ["", f" = {split} = \n", ""] + [f" {split} sentence number {i} of the article . \n" for i in range(50)]


def wikitext_splits(datasets):
    return datasets.DatasetDict(
        {s: datasets.Dataset.from_dict({"text": wikitext_rows(s)}) for s in ("train", "validation", "test")}
    )


def test_wikitext_from_local_folders(datasets, tmp_path, capfd):
    splits = wikitext_splits(datasets)
    splits.save_to_disk(str(tmp_path / "saved"))
    clone = tmp_path / "clone" / "wikitext-2-raw-v1"
    plain = tmp_path / "plain"
    for folder in (clone, plain):
        folder.mkdir(parents=True)
    for split, rows in splits.items():
        rows.to_parquet(str(clone / f"{split}-00000-of-00001.parquet"))
        (plain / f"{split}.txt").write_text("".join(r.rstrip("\n") + "\n" for r in wikitext_rows(split)))
    (clone.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: wikitext-2-raw-v1/{s}-*\n" for s in splits)
        + "- config_name: other\n  data_files: other/*\n---\n"
    )
    capfd.readouterr()
    read = [load_text(DataSpec(corpus="wikitext-2", folder=str(tmp_path / f))) for f in ("saved", "clone", "plain")]
    assert capfd.readouterr().err == ""  # no progress bars in a pipe
    assert read[0] == read[1] == read[2]
    # Its own validation split is held out, whatever eval_fraction says; the test split is left alone.
    assert read[0].train.startswith("\n = train = \n")
    assert "validation sentence number 49" in read[0].held_out
    assert "validation" not in read[0].train
    assert "test sentence" not in read[0].train + read[0].held_out


def test_wikitext_without_a_validation_split_holds_out_its_end(datasets, tmp_path):
    (tmp_path / "train.txt").write_text("".join(wikitext_rows("train")))
    text = load_text(DataSpec(corpus="wikitext-103", folder=str(tmp_path)))
    assert "sentence number 49" in text.held_out


def test_wikitext_that_cannot_be_had(datasets, tmp_path, monkeypatch):
    def offline(*args):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refusal(load_text, DataSpec(corpus="wikitext-2"))
    assert message.startswith("data.corpus: 'wikitext-2' could not be loaded")
    assert "ConnectionError: no route" in message
    assert "data.folder" in message
    missing = DataSpec(corpus="wikitext-2", folder=str(tmp_path / "absent"))
    assert refusal(load_text, missing).startswith("data.folder:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"lbw-rl\[hf\]"):
        load_text(DataSpec(corpus="wikitext-2"))


def test_a_folder_without_a_train_split_is_refused(datasets, tmp_path):
    (tmp_path / "test.txt").write_text("only a test\n")
    message = refusal(load_text, DataSpec(corpus="wikitext-2", folder=str(tmp_path)))
    assert message.startswith(f"data.folder: {str(tmp_path)!r} could not be loaded")


@pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"{WIKITEXT.name} of WikiText-2 is not beside this checkout")
def test_wikitext_as_a_text_file():
    corpus = load_corpus(DataSpec(corpus=str(WIKITEXT)))
    assert 300_000 < len(corpus.train) < 500_000
    assert len(corpus.held_out) == pytest.approx(len(corpus.train) / 9, rel=0.1)


# ---- batches


def test_batches_depend_on_seed_step_and_micro_batch_alone():
    tokens = torch.arange(10_000)
    batches = Batches(tokens, 16, 4, seed=7)
    forward = [batches(step, micro) for step in range(5) for micro in range(2)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    fresh = Batches(tokens, 16, 4, seed=7)
    backward = [fresh(step, micro) for step in reversed(range(5)) for micro in reversed(range(2))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward)))
    assert torch.equal(torch.get_rng_state(), state)  # and disturb no global generator
    assert forward[0].shape == (4, 16)
    assert forward[0].dtype == torch.int64
    assert torch.equal(forward[0] - forward[0][:, :1], torch.arange(16).expand(4, 16))  # windows of the stream
    others = [Batches(tokens, 16, 4, seed=8)(0, 0), *forward[1:]]
    assert not any(torch.equal(forward[0], other) for other in others)


def test_batches_reach_both_ends_of_the_text():
    batches = Batches(torch.arange(12), 8, 200, seed=0)
    starts = batches(0)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal(Batches(torch.arange(8), 8, 2, seed=0)(3), torch.arange(8).expand(2, 8))


def test_held_out_windows_are_fixed_disjoint_and_spread():
    tokens = torch.arange(1003)
    everything = held_out_windows(tokens, 10, 500)
    assert everything.shape == (100, 10)
    some = held_out_windows(tokens, 10, 8)
    assert some.shape == (8, 10)
    assert len(some.unique()) == 80
    assert int(some[0, 0]) == 0
    assert int(some[-1, 0]) >= 870
