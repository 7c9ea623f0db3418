import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Answer
from hypothesis import settings

from lbw_rl import FEATURES, Authority
from lbw_rl.policy import save_policy

# The same examples on every run: a property that fails, fails for everyone.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repeatable")

VOCABULARY = 48


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class SignMomentum(torch.optim.Optimizer):
    """A Lion-like optimizer that torch does not know (Chen et al. 2302.06675): betas, but no second moment."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_(torch.sign(first * m + (1 - first) * p.grad), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - second)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw-plain": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(3e-3)),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=3e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "custom": lambda p: SignMomentum(p, lr=1e-3),
}


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request: pytest.FixtureRequest) -> Callable[..., torch.optim.Optimizer]:
    """Every kind of optimizer in turn: parameters → optimizer."""
    return OPTIMIZERS[request.param]


@pytest.fixture(scope="session")
def make_lm() -> Callable[[], torch.nn.Module]:
    """Makes equal, real Qwen2 language models of a few thousand parameters, in training mode."""
    transformers = pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    model = transformers.Qwen2ForCausalLM(config).train()
    return lambda: copy.deepcopy(model)


@pytest.fixture(scope="session")
def tokens() -> Callable[[int], torch.Tensor]:
    """Step number → its batch of token ids, (2, 8)."""
    return lambda step: torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))


@pytest.fixture
def make_mlp() -> Callable[[], torch.nn.Module]:
    """Makes equal two-matrix networks, 8 → 12 → 3, small enough that the probe samples every element."""

    def make() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))

    return make


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen policy with random weights whose features are seldom out of distribution."""
    rng = np.random.default_rng(0)
    sizes = [len(FEATURES), 16, 2]
    layers = [
        (rng.normal(size=(o, i)).astype(np.float32) / np.sqrt(i, dtype=np.float32), np.zeros(o, np.float32))
        for i, o in pairwise(sizes)
    ]
    return save_policy(
        tmp_path_factory.mktemp("policy"),
        layers,
        mean=np.zeros(len(FEATURES)),
        std=np.ones(len(FEATURES)),
        authority=Authority(lr_scale=(0.01, 100.0), momentum_scale=(0.5, 2.0)),
        decide_every=1,
        provenance={"seed": 0},
        card="# A policy of random weights",
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that make a shipped recipe a run of six steps and a few milliseconds each, on a small real text."""
    from pydoc_data.topics import topics

    corpus = tmp_path_factory.mktemp("corpus") / "text.txt"
    corpus.write_text("\n".join(topics[key] for key in sorted(topics))[:20_000], encoding="utf-8")
    return [
        f"data.corpus={corpus}",
        "data.vocab_size=300",
        "data.sequence_length=16",
        "data.eval_sequences=4",
        "model.hidden_size=16",
        "model.intermediate_size=32",
        "model.num_layers=1",
        "model.num_heads=2",
        "model.num_kv_heads=1",
        "schedule.warmup_steps=2",
        "train.steps=6",
        "train.eval_every=3",
        "train.batch_size=2",
        "train.threads=1",
        "train.device=cpu",
    ]


@pytest.fixture
def small(tiny: list[str]) -> list[str]:
    """The same settings as arguments of a command."""
    return [part for setting in tiny for part in ("--set", setting)]


@pytest.fixture
def lbw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`lbw-rl ARGUMENTS` in this process."""
    from lbw_rl.cli import main

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["lbw-rl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Answer(ended.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a grid's cells here, one after the other: starting processes is for the tests that are about them."""

    @contextmanager
    def executor(backend: str, workers: int) -> Iterator[Callable[..., Future]]:
        def submit(function: Callable[..., Any], *args: Any) -> Future:
            future: Future = Future()
            try:
                future.set_result(function(*args))
            except Exception as error:
                future.set_exception(error)
            return future

        yield submit

    for user in ("grid", "benchmarks.records"):
        monkeypatch.setattr(f"lbw_rl.training_runs.{user}.executor", executor)


@pytest.fixture(scope="session")
def nvml_stand_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compiler's macro → folder of a stand-in for the NVIDIA driver's library, built with it."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler, on Linux")
    folders = {}
    for macro in ("CURRENT_DRIVER", "OLD_DRIVER", "NEW_DRIVER"):
        folders[macro] = tmp_path_factory.mktemp(macro)
        library = folders[macro] / "libnvidia-ml.so.1"
        source = Path(__file__).with_name("nvml_stand_in.c")
        subprocess.run([compiler, "-shared", "-fPIC", f"-D{macro}", "-o", library, source], check=True)
    return folders
