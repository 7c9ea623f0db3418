"""Where the text of a run comes from, and which part of it is held out."""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbw_rl.envs.extras import bars_on_terminals_only, hf_package
from lbw_rl.envs.recipe import DataSpec

_ACCEPTED = "accepted: 'python-docs', 'python-source', 'wikitext-2', 'wikitext-103', or the path of a UTF-8 text file"
_HUB_NAME = "Salesforce/wikitext"

_SOURCE_TEXT = 8_000_000  # characters; a Python without its tests has about ten million
# pydoc_data is the text of 'python-docs', which a model that learned from the sources is to meet as new; encodings
# are tables of numbers; the rest is what a machine, not Python, brings.
_NO_SOURCE = frozenset({"test", "tests", "idle_test", "pydoc_data", "encodings", "site-packages", "dist-packages"})
_OF_THE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")


class CorpusError(ValueError):
    """Text or tokenizer that cannot be used. One line that names the field, its value and what is accepted."""


@dataclass(frozen=True, slots=True)
class Text:
    """A corpus before tokenisation.

    Attributes:
        train: text to train on.
        held_out: text that only evaluation reads.
        sha256: hex digest of the UTF-8 bytes of `train` followed by `held_out`.
    """

    train: str
    held_out: str
    sha256: str


def load_text(data: DataSpec) -> Text:
    """Reads the corpus that `data` names and holds out its end, or WikiText's own validation split.

    Raises:
        CorpusError: no such corpus, an empty one, bytes that are not UTF-8, or a data set that cannot be had.
        ModuleNotFoundError: WikiText without the extra `lbw-rl[hf]`.
    """
    if data.corpus == "python-docs":
        text = _python_docs()
    elif data.corpus == "python-source":
        text = _python_source(Path(sysconfig.get_path("stdlib")))
    elif data.corpus in ("wikitext-2", "wikitext-103"):
        splits = _wikitext(data)
        held_out = _join_rows(splits["validation"]["text"]) if "validation" in splits else ""
        text = _join_rows(splits["train"]["text"])
        if held_out.strip():
            return _text(data, text, held_out)
    else:
        text = _file(data.corpus)
    cut = round(len(text) * (1.0 - data.eval_fraction))
    return _text(data, text[:cut], text[cut:])


def file_stamp(data: DataSpec) -> tuple[int, int] | None:
    """Modification time in ns and size of a corpus that is a file, by which a changed one is known; else None."""
    path = Path(data.corpus).expanduser()
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None


def _text(data: DataSpec, train: str, held_out: str) -> Text:
    if not train.strip() or not held_out.strip():
        raise CorpusError(f"data.corpus: {data.corpus!r} holds too little text to train on and to hold out a part")
    digest = hashlib.sha256(train.encode())
    digest.update(held_out.encode())
    return Text(train, held_out, digest.hexdigest())


def _python_docs() -> str:
    """The language reference that `help()` reads; its order in the module differs between Python versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusError(
            "data.corpus: 'python-docs' is missing from this Python (a trimmed standard library); "
            "accepted here: 'python-source', 'wikitext-2', 'wikitext-103', or the path of a UTF-8 text file"
        ) from error
    return "\n\n".join(topics[key] for key in sorted(topics))


def _python_source(library: Path) -> str:
    """The modules of the standard library in the order of their paths, without tests, to about eight million characters.

    The same for everybody who runs the same Python; `Text.sha256` tells where it is not.
    """
    parts: list[str] = []
    length = 0
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        inside = path.relative_to(library)
        folders = inside.parts[:-1]
        if _NO_SOURCE.intersection(folders) or path.name.startswith(_OF_THE_MACHINE):
            continue
        if not all((library.joinpath(*folders[: n + 1]) / "__init__.py").is_file() for n in range(len(folders))):
            continue  # in no package: scripts and data of the installation
        try:
            with tokenize.open(path) as file:  # in the encoding that the source declares
                parts.append(file.read())
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        length += len(parts[-1])
        if length >= _SOURCE_TEXT:
            break
    if not parts:
        raise CorpusError(
            "data.corpus: 'python-source' is missing from this Python (a standard library without *.py files); "
            "accepted here: 'python-docs', 'wikitext-2', 'wikitext-103', or the path of a UTF-8 text file"
        )
    return "\n\n".join(parts)[:_SOURCE_TEXT]


def _file(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no known corpus and no file of that name exists"
        raise CorpusError(f"data.corpus: {name!r} {what}; {_ACCEPTED}")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise CorpusError(
            f"data.corpus: {name!r} is not UTF-8 text (byte 0x{byte:02x} at offset {error.start}); {_ACCEPTED}"
        ) from error
    except OSError as error:
        raise CorpusError(f"data.corpus: {name!r} cannot be read ({error.strerror}); {_ACCEPTED}") from error


def _wikitext(data: DataSpec) -> Any:
    """Split name → rows with a `text` column, raw (untokenised) variant."""
    datasets = hf_package("datasets", f"data.corpus {data.corpus!r}")
    config = f"{data.corpus}-raw-v1"
    if data.folder is not None and not Path(data.folder).expanduser().is_dir():
        raise CorpusError(f"data.folder: {data.folder!r} is no folder; accepted: a local copy of {_HUB_NAME}")
    try:
        with bars_on_terminals_only():
            if data.folder is None:
                splits = datasets.load_dataset(_HUB_NAME, config)
            else:
                splits = _local_dataset(datasets, Path(data.folder).expanduser(), config)
        _ = [splits["train"].features["text"], *(split.features["text"] for split in splits.values())]
    except Exception as error:  # the library raises whatever its readers and its network client raise
        reason = " ".join(str(error).split())[:200]
        where = f"data.folder: {data.folder!r}" if data.folder else f"data.corpus: {data.corpus!r}"
        raise CorpusError(
            f"{where} could not be loaded as {config} with a train split and a text column "
            f"({type(error).__name__}: {reason}); accepted: data.folder with a local copy of {_HUB_NAME}, "
            "or another data.corpus"
        ) from error
    return splits


def _local_dataset(datasets: Any, folder: Path, config: str) -> Any:
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    # A clone of the hub repository lists its configurations; a bare folder of train/validation files has one.
    configs = datasets.get_dataset_config_names(str(folder))
    return datasets.load_dataset(str(folder), config if config in configs else None)


def _join_rows(rows: Iterable[str]) -> str:
    # Rows read from Parquet keep their newline, rows read from text files lost it.
    return "".join(row if row.endswith("\n") else f"{row}\n" for row in rows)
