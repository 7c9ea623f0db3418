"""One training run without anybody governing it: model, data, optimizer and schedule of a recipe."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lbw_rl.envs.adapters import frozen_digest, has_adapters, load_trained_state, trained_state
from lbw_rl.envs.clipping import build_clipping
from lbw_rl.envs.corpus import Batches, Corpus, held_out_windows, load_corpus
from lbw_rl.envs.extras import bars_on_terminals_only, hf_package
from lbw_rl.envs.model import build_model
from lbw_rl.envs.optim import build_optimizer, build_scheduler
from lbw_rl.envs.parallel import (
    averaged_when,
    parallelise,
    reshard,
    sharded_state,
    whole,
    whole_state,
    whole_weights,
)
from lbw_rl.envs.ranks import ALONE, Ranks
from lbw_rl.envs.reactive import ReactiveSchedule
from lbw_rl.envs.recipe import ModelSpec, Recipe, RecipeError
from lbw_rl.envs.recipe_models import model_folder
from lbw_rl.envs.rivals import evaluation_weights
from lbw_rl.random_state import capture_random_state, restore_random_state
from lbw_rl.sample import is_sharded

_EVAL_LOGITS = 1 << 24  # logits of one evaluation batch: 64 MiB in float32
_POSITIONS = 2048  # context of a fresh model: rotary positions cost nothing, and it may read longer text later


class TrainingTask:
    """The run that a recipe describes, one optimizer step at a time.

    A `model.path` of the form 'recipe:NAME' is trained first, where this machine has not kept it yet.

    ```python
    task = TrainingTask(load_recipe("mini-qwen2"))
    while task.step < task.total_steps:
        loss, norm = task.backward()
        task.advance()
    print(task.evaluate())
    ```

    A governor attaches to `task.optimizer` from outside; between `backward` and `advance` the gradients of
    the step are in place. Same recipe, same bits (CPU, same number of threads).

    Several ranks train a recipe together, to rounding as one process would: the rows of a step are the recipe's whatever
    their number, each reads its share of them, and gradients are averaged. All then call the same methods.

    Attributes:
        recipe: what was built.
        ranks: who trains it.
        model: the Hugging Face causal language model, in training mode; with `model.lora_rank`, `peft`'s around it.
        optimizer: torch optimizer at the scheduled learning rate.
        scheduler: its `LambdaLR` or `ReactiveSchedule`.
        step: optimizer steps done.
        total_steps: optimizer steps planned.
        sharded: whether this rank holds a share of each weight alone.
        tokens_per_step: tokens read by one optimizer step, all micro-batches of all ranks together.
        corpus_sha256: hex digest of the corpus' text.
        tokenizer: the `tokenizers.Tokenizer` of the corpus.
        device: where the model is.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks = ALONE) -> None:
        """Builds everything from the recipe.

        Args:
            recipe: what to train.
            ranks: who trains it, see `lbw_rl.envs.ranks.joined`.

        Raises:
            RecipeError, CorpusError, ModelError (all `ValueError`): one line on what cannot be used.
            ModuleNotFoundError: without the extra `lbw-rl[hf]`, or `lbw-rl[rivals]` where the recipe names one.
        """
        data, train = recipe.data, recipe.train
        self.recipe, self.ranks = recipe, ranks
        ranks.check(recipe)
        self.device = ranks.together(lambda: _device(train.device, ranks))
        if train.threads is not None:
            torch.set_num_threads(train.threads)

        def read() -> tuple[ModelSpec, Corpus]:
            model = recipe.model
            if model.path is not None:
                model = model.model_copy(update={"path": model_folder(model.path)})
            return model, load_corpus(data, model.path)

        spec, corpus = ranks.in_turn(read)
        positions = max(_POSITIONS, data.sequence_length) if spec.path is None else data.sequence_length
        model = ranks.together(lambda: build_model(spec, corpus.vocab_size, positions, train.seed))
        self._frozen = frozen_digest(model)
        self.model, self._forward = parallelise(model, train.parallel, self.device, ranks)
        self.model.train()
        self.sharded = any(is_sharded(p) for p in self.model.parameters())
        self.optimizer = build_optimizer(recipe.optimizer, self.model, recipe.optimizer.lr * train.lr_multiplier)
        self.scheduler = build_scheduler(recipe.schedule, self.optimizer, train.steps)
        self.step = 0
        self.total_steps = train.steps
        self.tokens_per_step = train.batch_size * train.accumulation * data.sequence_length
        self.corpus_sha256 = corpus.sha256
        self.tokenizer = corpus.tokenizer
        self._batches = Batches(corpus.train, data.sequence_length, train.batch_size, train.seed)
        self._held_out = held_out_windows(corpus.held_out, data.sequence_length, data.eval_sequences)
        self._clipping = build_clipping(recipe.optimizer, self.model, train.steps)
        self._loss: torch.Tensor | float = math.nan

    def backward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Forward and backward over the micro-batches of the step at hand, from zeroed gradients.

        Returns:
            The mean training loss of this rank's share, nats per token, and the L2 norm of the gradient of all ranks
            before clipping, `None` where the recipe does not clip: detached scalars on `device`, so that nothing waits
            for the accelerator.
        """
        train = self.recipe.train
        rows = torch.cat([self._batches(self.step, micro) for micro in range(train.accumulation)])
        micro_batches = self.ranks.micro_batches(rows, train.batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, tokens in enumerate(micro_batches, 1):
            tokens = tokens.to(self.device, non_blocking=True)
            with averaged_when(number == len(micro_batches), self._forward):
                loss = self._forward(input_ids=tokens, labels=tokens).loss
                (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        mean = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        self._loss = mean
        return mean, None if self._clipping is None else whole(self._clipping())

    def advance(self) -> None:
        """Takes the optimizer step with the gradients in place, then moves the schedule on.

        A schedule that answers to the loss reads it on the host here, once the step is on its way; others read nothing.
        """
        self.optimizer.step()
        if isinstance(self.scheduler, ReactiveSchedule):
            self.scheduler.step(self.ranks.mean(torch.as_tensor(self._loss, device=self.device)))
        else:
            self.scheduler.step()
        self.step += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on the held-out text, nats per token; inf or NaN of a diverged model is returned as it is.

        Ranks read a part of it each, and return the same. Of Schedule-Free the averaged weights are read; the run goes on
        from the bits that it had.
        """
        rows, length = self._held_out.shape
        vocabulary = self.model.config.vocab_size  # type: ignore[union-attr]
        batch = max(1, _EVAL_LOGITS // (length * int(vocabulary)))  # type: ignore[arg-type]
        batches = self._held_out.split(min(batch, -(-rows // self.ranks.world)))
        self.model.eval()
        total = torch.zeros((), device=self.device)
        turns = range(self.ranks.rank, -(-len(batches) // self.ranks.world) * self.ranks.world, self.ranks.world)
        with evaluation_weights(self.optimizer):
            for turn in turns:
                tokens = batches[turn % len(batches)].to(self.device)
                loss = self.model(input_ids=tokens, labels=tokens).loss.float() * len(tokens)
                if turn < len(batches):  # past the end a rank computes for company: sharded, no layer runs on one alone
                    total += loss
        self.model.train()
        reshard(self.model)
        return float(self.ranks.total(total)) / rows

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model and tokenizer as a folder that `model.path` (with `data.tokenizer = "model"`) accepts.

        Of LoRA the adapters alone; the folder names the model that they go with. All ranks call it; the first one writes.

        Raises:
            OSError: the disk is full or gone; the folder may hold part of the model.
        """
        with evaluation_weights(self.optimizer):
            weights = whole_weights(trained_state(self.model), self.model, self.ranks) if self.sharded else None
            if self.ranks.leads:
                try:
                    self._write(folder, weights)
                except SafetensorError as e:  # has the system's error in its words alone
                    if (found := re.search(r"\(os error (\d+)\)", str(e))) is None:
                        raise
                    raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from e

    def _write(self, folder: str | Path, weights: dict[str, Any] | None) -> None:
        transformers = hf_package("transformers", "saving a model")
        with bars_on_terminals_only():
            if has_adapters(self.model):
                # Embeddings are never trained; asked to find that out, peft would ask the hub.
                self.model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)  # type: ignore[operator]
            else:
                self.model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        transformers.PreTrainedTokenizerFast(tokenizer_object=self.tokenizer).save_pretrained(folder)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; `torch.load(weights_only=True)` accepts it once saved.

        Under LoRA the adapters, and a digest of the frozen weights, which come again from `model.path`. Its tensors are
        the live ones: save or copy them before the next step. Of sharded weights and moments the first rank gets a whole
        copy on its host, the others nothing; all call.
        """
        state = {
            "model": trained_state(self.model),
            "frozen": self._frozen,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "clipping": None if self._clipping is None else self._clipping.state_dict(),
            "step": self.step,
            "corpus_sha256": self.corpus_sha256,
            "random": capture_random_state(),
        }
        return whole_state(state, self.ranks)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken, bit for bit (CPU).

        Every rank gives what the first one got, whatever the number of ranks was.

        Raises:
            ValueError: the state is of another corpus, model (under LoRA, of other frozen weights) or optimizer.
        """
        if state["corpus_sha256"] != self.corpus_sha256:
            raise ValueError(
                f"checkpoint: was trained on a corpus of sha256 {state['corpus_sha256'][:12]}…, "
                f"the recipe's is {self.corpus_sha256[:12]}…"
            )
        state = sharded_state(state, self.model, self.optimizer)
        try:
            load_trained_state(self.model, state["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"checkpoint: does not fit the recipe's model ({reason})") from error
        if state.get("frozen", "") != self._frozen:
            raise ValueError(
                f"checkpoint: was trained on other frozen weights than model.path {self.recipe.model.path!r} holds now"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self._clipping is not None:
            self._clipping.load_state_dict(state["clipping"])
        self.step = int(state["step"])
        restore_random_state(state["random"])


def _device(name: str, ranks: Ranks) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("train.device: 'cuda' is not available here; accepted: 'auto', 'cpu'")
    if name == "cpu" or ranks.world == 1:
        return torch.device(name)
    if ranks.local_rank >= torch.cuda.device_count():
        raise RecipeError(
            f"train.device: rank {ranks.rank} would need GPU {ranks.local_rank}, this machine has "
            f"{torch.cuda.device_count()}; accepted: as many processes a machine as GPUs, or 'cpu'"
        )
    return torch.device(name, ranks.local_rank)
