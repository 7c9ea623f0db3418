"""Which proxies go side by side: kinds of them, and how many of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lbw_rl.envs.families.family import Family
from lbw_rl.envs.families.fine_tuned import FineTunedShape
from lbw_rl.envs.families.ngram import NGramShape
from lbw_rl.envs.families.transformer import FleetShape
from lbw_rl.envs.proxy_data import BatchShape
from lbw_rl.envs.proxy_training import ProxyTrainingVectorEnv
from lbw_rl.envs.splits import corpora_of
from lbw_rl.envs.tasks import LR_ERROR, PLAIN, WELL_TUNED, WIDE, WIDE_LR_ERROR, Variety


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyKind:
    """Proxies of one shape; see `ProxyTrainingVectorEnv` for each attribute."""

    shape: Family = field(default_factory=FleetShape)
    batch: BatchShape = field(default_factory=BatchShape)
    horizon: tuple[int, int] = (48, 128)
    lr_error: tuple[float, float] = LR_ERROR
    well_tuned: float = WELL_TUNED
    variety: Variety = PLAIN
    split: str = "train"
    corpora: tuple[str, ...] | None = None

    def fleet(self, num_envs: int, **arguments: Any) -> ProxyTrainingVectorEnv:
        """An environment of `num_envs` such proxies.

        Args:
            num_envs: how many.
            arguments: the environment's others: authority, decide_every, base_run, rule.
        """
        return ProxyTrainingVectorEnv(
            num_envs,
            shape=self.shape,
            batch=self.batch,
            horizon=self.horizon,
            lr_error=self.lr_error,
            well_tuned=self.well_tuned,
            variety=self.variety,
            split=self.split,
            corpora=self.corpora,
            **arguments,
        )

    @property
    def drawn_corpora(self) -> tuple[str, ...]:
        """Names of the texts that tasks are drawn from: the chosen ones, or all of the split."""
        return tuple(corpora_of(self.shape.name, self.split)) if self.corpora is None else self.corpora

    def record(self) -> dict[str, Any]:
        """What tasks of this kind are drawn from, as JSON data."""
        fields = {name: asdict(getattr(self, name)) for name in ("shape", "batch", "variety")}
        plain = {name: getattr(self, name) for name in ("horizon", "lr_error", "well_tuned", "split")}
        return {
            "model": self.shape.name,
            "corpora": self.drawn_corpora,
            **plain,
            **fields,
        }


Mixture = Sequence[tuple[ProxyKind, int]]
"""Kinds of proxies and how many of each; every entry is a batched program of its own."""

_WIDER = FleetShape(vocab=256, width=64, heads=4, ffn=128)
_DEEPER = replace(_WIDER, vocab=512, layers=3, ffn=176)
_TWO_LAYERS = replace(_WIDER, vocab=1024, layers=2)
_STEEP = replace(WIDE, init_scale=(0.5, 4.0))
"""Initial weights up to four times as large: as steep as models of real width, at the price of the default proxy."""
_NOISY = replace(_STEEP, batches=(0.5, 0.25, 0.125), noisy=1.0)
"""Steep models on few sequences with wrong labels: there even the rule's steps are too large, by up to two.
Two of five proxies are of this kind: they cost a fifth of the others, and what they teach helps elsewhere, too (docs/LOG.md, 2026-11-29 and 30)."""
_FRESH = replace(WIDE, init_scale=(1.0, 1.0))
_TOKENS = ("python-source",)

_SYNTHETIC = (
    ProxyKind(horizon=(48, 256), lr_error=WIDE_LR_ERROR, variety=_STEEP),
    ProxyKind(horizon=(48, 256), lr_error=WIDE_LR_ERROR, variety=_NOISY),
    ProxyKind(horizon=(128, 384), variety=replace(_STEEP, faulty=0.0, noisy=0.0)),
    ProxyKind(shape=FineTunedShape(), horizon=(48, 256), variety=_FRESH),
    ProxyKind(shape=NGramShape(), horizon=(64, 384), variety=_FRESH),
    ProxyKind(shape=_WIDER, batch=BatchShape(6, 24, 8), horizon=(128, 384)),
)

MIXTURES: dict[str, Mixture] = {
    "plain": ((ProxyKind(), 32), (ProxyKind(), 32)),
    "broad": tuple(zip(_SYNTHETIC, (12, 36, 8, 12, 8, 12), strict=True)),
    "tokens": (
        *zip(_SYNTHETIC, (6, 32, 4, 5, 3, 6), strict=True),
        # A real text, where more than the rule's level costs the most, and vocabularies up to that of real recipes here.
        (ProxyKind(shape=FleetShape(vocab=512), batch=BatchShape(8, 24, 8), horizon=(64, 384), corpora=_TOKENS), 8),
        (ProxyKind(shape=_DEEPER, batch=BatchShape(8, 24, 8), horizon=(128, 320), corpora=_TOKENS), 4),
        (ProxyKind(shape=FleetShape(vocab=1024), batch=BatchShape(8, 48, 8), horizon=(96, 256), corpora=_TOKENS), 6),
        (ProxyKind(shape=_TWO_LAYERS, batch=BatchShape(8, 32, 8), horizon=(128, 320), corpora=_TOKENS), 4),
    ),
}
"""Name → mixture. "plain" is what scales are learned on: the default proxy. "broad" is what multiples of a rule are
learned on: the rule's best level differs among its kinds with how steep a model is, how noisy, and how long it runs. "tokens"
adds models that read the tokens of a real text (needs the extra `lbw-rl[hf]`)."""


def mixture_named(name: str) -> Mixture:
    """The mixture of that name.

    Raises:
        ValueError: there is none; lists the known ones.
    """
    if name not in MIXTURES:
        raise ValueError(f"mixture: {name!r} is unknown; accepted: {', '.join(MIXTURES)}")
    return MIXTURES[name]
