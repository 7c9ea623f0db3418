"""The frozen policy: a folder with safetensors weights and a JSON header, no pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from lbw_rl.authority import Authority
from lbw_rl.features import FEATURE_LIMIT, FEATURE_SCHEMA, FEATURES
from lbw_rl.registry import check_rule
from lbw_rl.steering import REACH

POLICY_SCHEMA = 2
WEIGHTS_FILE, HEADER_FILE, CARD_FILE = "policy.safetensors", "policy.json", "CARD.md"


class PolicyError(ValueError):
    """A policy folder that is refused; the message names the file, the field and what is accepted."""


class Fallback(BaseModel):
    """When the policy hands over to a rule: too many features out of distribution."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    controller: str = Field("lbw-guard", description="name of the rule-based controller that takes over")
    feature_z: float = Field(
        6.0, gt=0, description="a feature this many training deviations from its training mean is out of distribution"
    )
    rate: float = Field(
        0.5, gt=0, le=1, description="share of recent decisions with such a feature past which the rule takes over"
    )
    window: int = Field(20, ge=1, description="recent decisions that the rate counts")
    adapters: bool = Field(
        True,
        description="whether the rule governs runs that train low-rank adapters from the first step on: no proxies in training do",
    )

    @field_validator("controller")
    @classmethod
    def _is_a_rule(cls, name: str) -> str:
        return check_rule(name)


class PolicyHeader(BaseModel):
    """`policy.json`: everything that running the weights takes, and where they come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy_schema: int = Field(description="version of this header")
    feature_schema: int = Field(description="version of the feature vector")
    features: dict[str, str] = Field(description="ordered feature name → definition")
    feature_limit: float = Field(description="features are clipped to ± this")
    mean: list[float] = Field(description="normaliser: mean of each feature in training")
    std: list[float] = Field(description="normaliser: standard deviation of each feature in training")
    hidden_sizes: list[int] = Field(description="widths of the hidden layers, tanh")
    relative_to: str = Field(
        "schedule",
        description="what the two outputs in [-1, 1] stand for: 'schedule', positions within the authority's ranges; or the "
        "name of a rule, multiples of its lr_scale and momentum_scale",
    )
    rule_every: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between two decisions of that rule; null: as many as between two of the policy's own",
    )
    reach: tuple[float, float] = Field(
        REACH,
        description="largest multiples of a rule's lr_scale and momentum_scale, the smallest being their inverses",
    )
    authority: Authority = Field(description="authority that it was trained under")
    decide_every: int = Field(ge=1, description="optimizer steps per decision")
    stretches: int | None = Field(
        None,
        ge=1,
        description="equal parts of a run in each of which one action is held: that at the first decision of the part, but in the first part, "
        "which begins neutral, that at the run's second; null: an action for every decision",
    )
    fallback: Fallback = Field(description="when a rule takes over", default_factory=Fallback)
    provenance: dict[str, Any] = Field(description="seeds, task distribution, package versions")
    weights_sha256: str = Field(description="SHA-256 of policy.safetensors")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.relative_to not in ("schedule", self.fallback.controller):
            raise ValueError(
                f"relative_to is {self.relative_to!r}; accepted: 'schedule', or the fallback's {self.fallback.controller!r}"
            )
        if not all(1.0 <= r < math.inf for r in self.reach):
            raise ValueError(f"reach is {self.reach}; accepted: finite numbers ≥ 1")
        return self


@dataclass(frozen=True)
class Policy:
    """An intact frozen policy.

    Attributes:
        header: the validated `policy.json`.
        layers: (weight of shape (out, in), bias of shape (out,)) of each layer, float32.
    """

    header: PolicyHeader
    layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]]

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """The normaliser's mean of each feature."""
        return np.array(self.header.mean)

    @cached_property
    def std(self) -> NDArray[np.float64]:
        """The normaliser's standard deviation of each feature."""
        return np.array(self.header.std)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what it does: weights and header, but not where they come from."""
        return hashlib.sha256(self.header.model_dump_json(exclude={"provenance"}).encode()).hexdigest()

    def action(self, features: NDArray[np.float64]) -> NDArray[np.float32]:
        """The mean action for one feature vector.

        Args:
            features: shape (len(FEATURES),), within ± the feature limit.

        Returns:
            shape (2,), clipped to [-1, 1].
        """
        x = ((features - self.mean) / self.std).astype(np.float32)
        for weight, bias in self.layers[:-1]:
            x = np.tanh(weight @ x + bias)
        weight, bias = self.layers[-1]
        return (weight @ x + bias).clip(-1.0, 1.0)


def save_policy(
    folder: str | Path,
    layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]],
    *,
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    authority: Authority,
    decide_every: int,
    provenance: dict[str, Any],
    card: str,
    rule: str | None = None,
    stretches: int | None = None,
) -> Path:
    """Freezes an actor into `folder`: weights, header and model card.

    Args:
        folder: made if it does not exist; its policy files are replaced.
        layers: as in `Policy.layers`, the last one giving 2 outputs.
        mean, std: the normaliser, shape (len(FEATURES),) each.
        authority, decide_every: what it was trained under.
        provenance: JSON data on seeds, tasks and versions.
        card: text of CARD.md.
        rule: name of the controller that its actions are relative to, which acts at every step; it is then the fallback as well.
        stretches: parts of a run in each of which an action is held; None: an action for every decision.

    Raises:
        PolicyError: the layers do not fit the features or hold a non-finite value.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for i, (weight, bias) in enumerate(layers):
        tensors[f"{i}.weight"] = np.ascontiguousarray(weight, dtype=np.float32)
        tensors[f"{i}.bias"] = np.ascontiguousarray(bias, dtype=np.float32)
    weights = save_safetensors(tensors)
    header = PolicyHeader(
        policy_schema=POLICY_SCHEMA,
        feature_schema=FEATURE_SCHEMA,
        features=FEATURES,
        feature_limit=FEATURE_LIMIT,
        mean=[float(x) for x in mean],
        std=[float(x) for x in std],
        hidden_sizes=[int(weight.shape[0]) for weight, _ in layers[:-1]],
        authority=authority,
        decide_every=decide_every,
        relative_to=rule or "schedule",
        rule_every=None if rule is None else 1,
        stretches=stretches,
        fallback=Fallback() if rule is None else Fallback(controller=rule),
        provenance=provenance,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    _checked_layers(folder, header, tensors)
    # The header goes last: a folder with a header has everything that the header speaks of.
    _write(folder / WEIGHTS_FILE, weights)
    _write(folder / CARD_FILE, card.encode())
    _write(folder / HEADER_FILE, (json.dumps(header.model_dump(), indent=2) + "\n").encode())
    return folder


def load_policy(folder: str | Path) -> Policy:
    """Reads and checks a frozen policy.

    Raises:
        PolicyError: a missing file, a malformed header, another schema version, features in another order,
            weights whose hash, shapes or values are not what the header says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PolicyError(f"policy: {folder} is not a folder; accepted: a folder with {HEADER_FILE} and {WEIGHTS_FILE}")
    for name in (HEADER_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise PolicyError(f"policy: {folder} has no {name}; accepted: a folder that `lbw-rl train-policy` wrote")
    header = _header(folder)
    weights = (folder / WEIGHTS_FILE).read_bytes()
    if (digest := hashlib.sha256(weights).hexdigest()) != header.weights_sha256:
        raise PolicyError(
            f"policy: {WEIGHTS_FILE} has SHA-256 {digest[:12]}…, {HEADER_FILE} says {header.weights_sha256[:12]}…: the weights were altered"
        )
    try:
        tensors = load_safetensors(weights)
    except (SafetensorError, KeyError) as e:  # KeyError: a dtype that numpy does not have
        raise PolicyError(f"policy: {WEIGHTS_FILE} is not a safetensors file of float32 tensors ({e})") from e
    return Policy(header, _checked_layers(folder, header, tensors))


def _header(folder: Path) -> PolicyHeader:
    try:
        raw = json.loads((folder / HEADER_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, or nested without end
        raise PolicyError(f"policy: {HEADER_FILE} is not JSON ({e})") from e
    version = raw.get("policy_schema") if isinstance(raw, dict) else None
    if version != POLICY_SCHEMA:
        raise PolicyError(f"policy: policy_schema is {version!r}; this version reads {POLICY_SCHEMA}")
    if raw.get("feature_schema") != FEATURE_SCHEMA:
        raise PolicyError(
            f"policy: feature_schema is {raw.get('feature_schema')!r}; this version computes {FEATURE_SCHEMA}"
        )
    try:
        header = PolicyHeader.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise PolicyError(f"policy: {HEADER_FILE} field {where}: {first['msg']}") from e
    if list(header.features) != list(FEATURES) or header.feature_limit != FEATURE_LIMIT:
        raise PolicyError(
            f"policy: features are {', '.join(header.features)}; this version computes {', '.join(FEATURES)}, in that order"
        )
    for name, values in (("mean", header.mean), ("std", header.std)):
        ok = len(values) == len(FEATURES) and bool(np.isfinite(values).all()) and (name == "mean" or min(values) > 0)
        if not ok:
            raise PolicyError(f"policy: {name} must be {len(FEATURES)} finite numbers{' > 0' if name == 'std' else ''}")
    return header


def _checked_layers(
    folder: Path, header: PolicyHeader, tensors: dict[str, NDArray[Any]]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    sizes = [len(FEATURES), *header.hidden_sizes, 2]
    expected = {f"{i}.{kind}" for i in range(len(sizes) - 1) for kind in ("weight", "bias")}
    if set(tensors) != expected:
        raise PolicyError(
            f"policy: {WEIGHTS_FILE} holds {sorted(tensors)}; hidden_sizes {header.hidden_sizes} need {sorted(expected)}"
        )
    layers = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        weight, bias = tensors[f"{i}.weight"], tensors[f"{i}.bias"]
        if (
            weight.shape != (outputs, inputs)
            or bias.shape != (outputs,)
            or {weight.dtype, bias.dtype} != {np.dtype(np.float32)}
        ):
            raise PolicyError(
                f"policy: layer {i} is {weight.dtype} {weight.shape} + {bias.dtype} {bias.shape}; needed: float32 ({outputs}, {inputs}) + ({outputs},)"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise PolicyError(f"policy: layer {i} of {folder / WEIGHTS_FILE} holds a non-finite value")
        layers.append((weight, bias))
    return layers


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
