"""The variants: every fact about a model, in one table.

Other files ask this table; none of them looks inside a model id.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from runtime.errors import SettingError, UnknownModelError

PATCH = 14
MIN_SIDE = 84
MAX_SIDE = 1036


class Head(StrEnum):
    """Decoder on top of the backbone; also the name of the engine's folder."""

    DPT = "dpt"


class Unit(StrEnum):
    """What the numbers of a depth map mean."""

    RELATIVE = "relative"
    METRES = "m"


@dataclass(frozen=True)
class Variant:
    """One DA3 model.

    Attributes
    ----------
    model_id : str
        Short id, also the name of upstream's configuration.
    repo : str
        Hub repository of the preferred checkpoint.
    unit : Unit
        Unit of the network's depth.
    licence : str
        SPDX id of the checkpoint's licence.
    """

    model_id: str
    repo: str
    unit: Unit
    licence: str


VARIANTS: dict[str, Variant] = {
    variant.model_id: variant
    for variant in (Variant("da3-small", "depth-anything/DA3-SMALL", Unit.RELATIVE, "Apache-2.0"),)
}


def find_variant(model: str) -> Variant:
    """The variant named ``model``: a short id in any case, or the full hub repository name.

    Raises
    ------
    UnknownModelError
        Naming the ids there are.
    """
    wanted = model.strip().lower()
    for variant in VARIANTS.values():
        if wanted in (variant.model_id, variant.repo.lower()):
            return variant
    known = ", ".join(VARIANTS)
    raise UnknownModelError(f"MODEL {model!r} is not a known model; choose one of: {known}.")


def find_head(head: str) -> Head:
    """The head named ``head`` in any case.

    Raises
    ------
    SettingError
        Naming the heads there are.
    """
    try:
        return Head(head.strip().lower())
    except ValueError:
        known = ", ".join(Head)
        raise SettingError(f"HEAD {head!r} is not a known head; choose one of: {known}.") from None
