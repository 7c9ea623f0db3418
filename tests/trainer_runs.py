"""Small real Trainer runs for the tests of the Hugging Face integration."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lbw_rl import Action, Authority, Controller

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0))
STEPS, LR = 6, 3e-2


class Text(torch.utils.data.Dataset):
    """Rows of a short cycle with some noise: something that can be learned in a few steps."""

    def __init__(self, ignored: int = 0) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(48, (64, 8), generator=generator)
        cycle = (torch.arange(8) + torch.randint(48, (64, 1), generator=generator)) % 48
        self.rows = torch.where(torch.rand(64, 8, generator=generator) < 0.2, noise, cycle)
        self.labels = self.rows.clone()
        for row in range(0, 64, 3):  # rows of different length: the label -100 is no target
            self.labels[row, 8 - ignored :] = -100

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


@functools.cache
def _qwen() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **heads)).train()


@functools.cache
def _llama_with_lora() -> torch.nn.Module:
    import peft

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).train()


MODELS: dict[str, Callable[[], torch.nn.Module]] = {"full": _qwen, "lora": _llama_with_lora}


def make_model(kind: str = "full") -> torch.nn.Module:
    """Equal models at every call: a Qwen2 trained whole, or a Llama with LoRA adapters."""
    return copy.deepcopy(MODELS[kind]())


def make_trainer(
    folder: Path, *callbacks: Any, kind: str = "full", data: Any = None, evaluated: Any = None, **changes: Any
) -> Any:
    """A Trainer over `Text`, with rows in their order so that a loop by hand can take the same ones."""
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "train_sampling_strategy": "sequential",
        "seed": 3,
    }
    return transformers.Trainer(
        make_model(kind),
        transformers.TrainingArguments(**(settings | changes)),
        train_dataset=data or Text(),
        eval_dataset=evaluated,
        callbacks=list(callbacks),
    )


def run_trainer(folder: Path, *callbacks: Any, resume: Any = None, **changes: Any) -> Any:
    """A Trainer that has trained."""
    trainer = make_trainer(folder, *callbacks, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Scripted(Controller):
    """Acts at the given steps, and holds a scale that depends on the step otherwise."""

    name = "scripted"
    time_limit = None

    def __init__(self, script: dict[int, Action]) -> None:
        self.script = script

    def reset(self, context: Any) -> None:
        pass

    def act(self, telemetry: Any) -> Action:
        return self.script.get(int(telemetry.step), Action(lr_scale=1.0 - 0.1 * (telemetry.step % 3)))


class Poisoned(transformers.TrainerCallback):
    """Makes the model's hidden states NaN at given steps: what a corrupt record or a failing device does."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.now = steps, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        embedding = kwargs["model"].get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: out * float("nan") if self.now else out)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now = state.global_step in self.steps


class States(transformers.TrainerCallback):
    """What training moves: copies from just before and just after every optimizer step."""

    def __init__(self) -> None:
        self.before: list[Any] = []
        self.after: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append(self._copy(**kwargs))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(self._copy(**kwargs))

    def _copy(self, model: Any, optimizer: Any, lr_scheduler: Any, **_: Any) -> Any:
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return copy.deepcopy({"w": weights, "o": optimizer.state_dict(), "s": lr_scheduler.state_dict()})


class Seen(transformers.TrainerCallback):
    """A tracker: what is logged, and the rate that a logger would read."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.rates: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.logs.append(dict(logs or {}))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


def same(a: Any, b: Any) -> bool:
    """Whether nested data are equal, tensors bit for bit; Trainers are compared by their weights."""
    if isinstance(a, transformers.Trainer):
        return same(weights(a), weights(b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def decisions(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if r["type"] == "decision"]


def signal(made: list[dict[str, Any]], name: str) -> list[float]:
    return [d["telemetry"][name] for d in made]


def logged(trainer: Any, name: str) -> list[float]:
    """What Trainer logged of training under a name, step by step."""
    return [r[name] for r in trainer.state.log_history if "loss" in r and name in r]
