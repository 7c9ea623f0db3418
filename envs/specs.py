"""The fields of a recipe: everything that decides a training run's bits, validated.

Each description is the field's documentation wherever it is shown: command-line help, error messages, docs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lbw_rl.authority import Authority


def _none_word(value: object) -> object:
    return None if value == "none" else value


def _none_or_zero(value: object) -> object:
    return None if value in ("none", 0) else value


# TOML has no null, so a recipe or an override writes "none".
OptionalText = Annotated[str | None, BeforeValidator(_none_word)]
OptionalCount = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_none_word)]
OptionalBound = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none_or_zero)]


class _Spec(BaseModel):
    # Strict, since TOML is typed: `steps = "300"` or `steps = true` is a mistake, not a number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelSpec(_Spec):
    """Which causal language model is trained: a fresh one of an architecture, or a pretrained one."""

    architecture: Annotated[Literal["qwen2", "llama"] | None, BeforeValidator(_none_word)] = Field(
        default=None, description="fresh, randomly initialised model of this architecture; excludes `path`"
    )
    path: OptionalText = Field(
        default=None,
        description="pretrained causal language model: local folder (of a model or of LoRA adapters), hub id, or "
        "'recipe:NAME' for the model that this machine trains by that recipe once and keeps; excludes `architecture`",
    )
    hidden_size: int = Field(default=64, ge=2, description="width of the residual stream (fresh models only, as below)")
    intermediate_size: int = Field(default=176, ge=1, description="width of the gated feed-forward layers")
    num_layers: int = Field(default=2, ge=1, description="transformer blocks")
    num_heads: int = Field(
        default=4, ge=1, description="attention heads; hidden_size / num_heads must be a whole even number"
    )
    num_kv_heads: int = Field(default=4, ge=1, description="key-value heads; must divide num_heads")
    tie_embeddings: bool = Field(
        default=True, description="whether the output layer shares the input embedding's weights"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type of weights and computation")
    lora_rank: OptionalCount = Field(
        default=None, description="rank of LoRA adapters, the only weights that are then trained; 'none' trains all"
    )
    lora_alpha: float = Field(default=16.0, gt=0.0, description="LoRA adapters count alpha / rank times")
    lora_targets: Literal["all-linear", "attention"] = Field(
        default="all-linear",
        description="layers that get a LoRA adapter: every linear one but the output, or q, k, v, o",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if (self.architecture is None) == (self.path is None):
            raise ValueError(
                "needs exactly one of architecture ('qwen2' or 'llama') and path (a local folder or hub id)"
            )
        if self.lora_rank is not None and self.path is None:
            raise ValueError("lora_rank needs path: adapters correct pretrained weights; a fresh model accepts 'none'")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        return self


class DataSpec(_Spec):
    """What text is trained on, how it is cut into tokens and what is held out."""

    corpus: str = Field(
        default="python-docs",
        min_length=1,
        description="'python-docs' (ships with CPython), 'python-source' (its standard library), 'wikitext-2', "
        "'wikitext-103', or the path of a UTF-8 text file",
    )
    folder: OptionalText = Field(default=None, description="local copy of the WikiText data set, instead of the hub")
    tokenizer: Literal["bpe", "model"] = Field(
        default="bpe",
        description="'bpe': byte-level BPE trained on the training part of the corpus; "
        "'model': the one of `model.path`",
    )
    vocab_size: int = Field(
        default=1024, ge=256, description="entries of the trained BPE; 256 of them are the single bytes"
    )
    sequence_length: int = Field(default=64, ge=2, description="tokens per sequence")
    eval_fraction: float = Field(
        default=0.1,
        gt=0.0,
        lt=1.0,
        description="share of the text, at its end, that is held out; "
        "WikiText holds out its own validation split instead",
    )
    eval_sequences: int = Field(default=64, ge=1, description="most held-out sequences that one evaluation reads")

    @model_validator(mode="after")
    def _consistent(self) -> DataSpec:
        if self.folder is not None and self.corpus not in ("wikitext-2", "wikitext-103"):
            raise ValueError(f"folder goes with corpus 'wikitext-2' or 'wikitext-103', not {self.corpus!r}")
        return self


class OptimizerSpec(_Spec):
    """The optimizer under the governor. Its update rule is torch's own."""

    name: Literal["adamw", "sgd", "adafactor", "stable-adamw", "schedule-free", "prodigy"] = Field(
        default="adamw",
        description="torch.optim's AdamW, SGD or Adafactor; StableAdamW, Schedule-Free AdamW or Prodigy of their packages",
    )
    lr: float = Field(default=3e-3, gt=0.0, description="peak learning rate, before train.lr_multiplier")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False, description="decay of the first and second moment (adamw)"
    )
    eps: float = Field(default=1e-8, gt=0.0, description="added to the root of the second moment (adamw)")
    weight_decay: float = Field(
        default=0.01,
        ge=0.0,
        description="decoupled decay of weights of two or more dimensions (coupled for sgd)",
    )
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0, description="heavy-ball momentum (sgd)")
    grad_clip: OptionalBound = Field(
        default=None, description="largest global gradient norm; 0 or 'none' leaves gradients alone"
    )
    adaptive_clip: Annotated[Literal["zclip", "adagc"] | None, BeforeValidator(_none_word)] = Field(
        default=None, description="clip by the run's own gradient norms: of all tensors (zclip) or each (adagc)"
    )
    implementation: Literal["foreach", "fused", "plain"] = Field(default="foreach", description="torch's kernel choice")
    per_tensor: bool = Field(
        default=False,
        description="one parameter group per tensor, so that a controller can scale each of them by itself",
    )

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerSpec:
        if self.name not in ("adamw", "sgd") and self.implementation == "fused":
            raise ValueError(f"implementation 'fused' does not exist for {self.name}; accepted: 'foreach', 'plain'")
        if self.name in ("schedule-free", "prodigy") and self.per_tensor:
            # Prodigy refuses groups at several rates; Schedule-Free's averages would differ by group, unseen by checkpoints.
            raise ValueError(f"per_tensor does not go with {self.name}; accepted: false")
        if self.adaptive_clip == "adagc" and self.grad_clip is not None:
            raise ValueError("grad_clip does not go with adaptive_clip 'adagc', which brings its own; accepted: 'none'")
        return self


class ScheduleSpec(_Spec):
    """The learning-rate schedule: a closed-form multiple of the peak, or an answer to the training loss.

    The governor scales what it gives.
    """

    name: Literal["constant", "linear", "cosine", "wsd", "greedy", "plateau"] = Field(
        default="cosine",
        description="shape after warmup; wsd: constant, then linear to zero; driven by the training loss: greedy "
        "(transformers' GreedyLR), plateau (torch's ReduceLROnPlateau)",
    )
    warmup_steps: int = Field(
        default=20,
        ge=0,
        description="steps of linear warmup; step i runs at (i + 1) / warmup_steps of the peak",
    )
    decay_fraction: float = Field(
        default=0.2, gt=0.0, le=1.0, description="share of all steps that wsd decays over, at the end"
    )


class TrainSpec(_Spec):
    """Length, batch, seed and bookkeeping of the run."""

    steps: int = Field(default=300, ge=1, description="optimizer steps")
    batch_size: int = Field(default=8, ge=1, description="sequences per micro-batch; with ranks, at most and on each")
    accumulation: int = Field(
        default=1,
        ge=1,
        description="micro-batches per optimizer step of one process; ranks share the step's batch_size × accumulation "
        "sequences evenly",
    )
    lr_multiplier: float = Field(default=1.0, gt=0.0, description="stress axis: multiplies optimizer.lr")
    seed: int = Field(default=0, ge=0, description="decides initial weights and the order of the data")
    eval_every: int = Field(
        default=25, ge=0, description="optimizer steps between evaluations; 0: only at the start and the end"
    )
    checkpoint_every: int = Field(
        default=500,
        ge=0,
        description="optimizer steps between checkpoints; 0: none on the way, and no model at the end",
    )
    threads: OptionalCount = Field(default=None, description="torch CPU threads; 'none' leaves the process as it is")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to train; auto: cuda where there is one"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="how several ranks (torchrun) hold the model: ddp, each the whole of it; fsdp, a share of every weight, "
        "gradient and moment (FSDP2). Nothing to a process alone",
    )
    measure_device: bool = Field(
        default=True,
        description="whether the governor reads clock and device; false: those signals are missing, and two runs of "
        "the recipe leave the same ledger",
    )


class ControllerSpec(_Spec):
    """Who governs the run."""

    name: str = Field(default="constant", min_length=1, description="controller name, or the folder of a frozen policy")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of that controller")


# Wider than `Authority()`, which is made for runs that cost money: a recipe's learning rate may be wrong a
# hundredfold on purpose.
_AUTHORITY: dict[str, Any] = {"lr_scale": (1e-3, 100.0), "momentum_scale": (0.5, 2.0), "slew_up": 4.0}


def _on_recipe_default(value: object) -> object:
    # A recipe that states one bound must not thereby fall back to `Authority()` in the others.
    return {**_AUTHORITY, **value} if isinstance(value, dict) else value


class Recipe(_Spec):
    """One training run, completely described."""

    name: str = Field(min_length=1, description="what results and reports call this run")
    model: ModelSpec = Field(description="the model to train")
    data: DataSpec = Field(default_factory=DataSpec, description="the text to train on")
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec, description="the optimizer under the governor")
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec, description="the learning-rate schedule")
    train: TrainSpec = Field(default_factory=TrainSpec, description="length, batch and seed")
    controller: ControllerSpec = Field(default_factory=ControllerSpec, description="who governs")
    authority: Annotated[Authority, BeforeValidator(_on_recipe_default)] = Field(
        default_factory=lambda: Authority(**_AUTHORITY),
        description="bounds on what the controller may do",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.data.tokenizer == "model" and self.model.path is None:
            raise ValueError("data.tokenizer 'model' needs model.path; a fresh model accepts 'bpe'")
        if self.optimizer.name == "schedule-free" and self.schedule.name != "constant":
            raise ValueError(
                f"schedule.name {self.schedule.name!r} does not go with optimizer.name 'schedule-free', whose average takes "
                "its place; accepted: 'constant' (schedule.warmup_steps holds)"
            )
        if self.optimizer.name == "prodigy" and self.controller.options.get("micro"):
            raise ValueError(
                "controller.options.micro does not go with optimizer.name 'prodigy', which has one rate for all; accepted: false"
            )
        return self
