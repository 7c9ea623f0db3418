"""The default shape of every family, by name."""

from __future__ import annotations

from lbw_rl.envs.families.family import Family
from lbw_rl.envs.families.fine_tuned import FineTunedShape
from lbw_rl.envs.families.lora import LoRAShape
from lbw_rl.envs.families.ngram import NGramShape
from lbw_rl.envs.families.quadratic import QuadraticShape
from lbw_rl.envs.families.transformer import FleetShape

FAMILIES: dict[str, Family] = {
    shape.name: shape
    for shape in (
        FleetShape(),
        FleetShape(qkv_bias=True),
        NGramShape(),
        QuadraticShape(),
        LoRAShape(),
        FineTunedShape(),
    )
}


def family(name: str) -> Family:
    """The default shape of a family.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if name not in FAMILIES:
        raise ValueError(f"family: {name!r} is unknown; accepted: {', '.join(FAMILIES)}")
    return FAMILIES[name]
