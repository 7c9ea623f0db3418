"""One training run without anybody governing it: model, data, optimizer and schedule of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lbw_rl.envs.corpus import Batches, held_out_windows, load_corpus
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
from lbw_rl.envs.recipe import Recipe, RecipeError
from lbw_rl.random_state import capture_random_state, restore_random_state
from lbw_rl.sample import is_sharded

_EVAL_LOGITS = 1 << 24  # logits of one evaluation batch: 64 MiB in float32
_POSITIONS = 2048  # context of a fresh model: rotary positions cost nothing, and it may read longer text later


class TrainingTask:
    """The run that a recipe describes, one optimizer step at a time.

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
        model: the Hugging Face causal language model, in training mode.
        optimizer: torch optimizer at the scheduled learning rate.
        scheduler: its `LambdaLR`.
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
            ModuleNotFoundError: without the extra `lbw-rl[hf]`.
        """
        data, train = recipe.data, recipe.train
        self.recipe, self.ranks = recipe, ranks
        ranks.check(recipe)
        self.device = ranks.together(lambda: _device(train.device, ranks))
        if train.threads is not None:
            torch.set_num_threads(train.threads)
        corpus = ranks.in_turn(lambda: load_corpus(data, recipe.model.path))
        positions = max(_POSITIONS, data.sequence_length) if recipe.model.path is None else data.sequence_length
        model = ranks.together(lambda: build_model(recipe.model, corpus.vocab_size, positions, train.seed))
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
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def backward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Forward and backward over the micro-batches of the step at hand, from zeroed gradients.

        Returns:
            The mean training loss of this rank's share, nats per token, and the L2 norm of the gradient of all ranks
            before clipping, `None` without `optimizer.grad_clip`: detached scalars on `device`, so that nothing waits for the accelerator.
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
        limit = self.recipe.optimizer.grad_clip
        if limit is None:
            return mean, None
        return mean, whole(torch.nn.utils.clip_grad_norm_(self._parameters, limit))

    def advance(self) -> None:
        """Takes the optimizer step with the gradients in place, then moves the schedule on."""
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on the held-out text, nats per token; inf or NaN of a diverged model is returned as it is.

        Ranks read a part of it each, and return the same.
        """
        rows, length = self._held_out.shape
        vocabulary = self.model.config.vocab_size  # type: ignore[union-attr]
        batch = max(1, _EVAL_LOGITS // (length * int(vocabulary)))  # type: ignore[arg-type]
        batches = self._held_out.split(min(batch, -(-rows // self.ranks.world)))
        self.model.eval()
        total = torch.zeros((), device=self.device)
        for turn in range(self.ranks.rank, -(-len(batches) // self.ranks.world) * self.ranks.world, self.ranks.world):
            tokens = batches[turn % len(batches)].to(self.device)
            loss = self.model(input_ids=tokens, labels=tokens).loss.float() * len(tokens)
            if turn < len(batches):  # past the end a rank computes for company: sharded, no layer runs on one alone
                total += loss
        self.model.train()
        reshard(self.model)
        return float(self.ranks.total(total)) / rows

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model and tokenizer as a folder that `model.path` (with `data.tokenizer = "model"`) accepts.

        All ranks call it; the first one writes.
        """
        transformers = hf_package("transformers", "saving a model")
        weights = whole_weights(self.model.state_dict(), self.model, self.ranks) if self.sharded else None
        if not self.ranks.leads:
            return
        with bars_on_terminals_only():
            self.model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        transformers.PreTrainedTokenizerFast(tokenizer_object=self.tokenizer).save_pretrained(folder)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; `torch.load(weights_only=True)` accepts it once saved.

        Its tensors are the live ones: save or copy them before the next step. Of sharded weights and moments the first
        rank gets a whole copy on its host, the others nothing; all call.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "corpus_sha256": self.corpus_sha256,
            "random": capture_random_state(),
        }
        return whole_state(state, self.ranks)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken, bit for bit (CPU).

        Every rank gives what the first one got, whatever the number of ranks was.

        Raises:
            ValueError: the state is of another corpus, model or optimizer.
        """
        if state["corpus_sha256"] != self.corpus_sha256:
            raise ValueError(
                f"checkpoint: was trained on a corpus of sha256 {state['corpus_sha256'][:12]}…, "
                f"the recipe's is {self.corpus_sha256[:12]}…"
            )
        state = sharded_state(state, self.model, self.optimizer)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"checkpoint: does not fit the recipe's model ({reason})") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
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
