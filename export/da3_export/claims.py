"""What the project claims, and how far it was verified: the rows of ``claims.json``."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from da3_runtime.store.manifest import Kind, Parity

PATH = Path(__file__).parent / "claims.json"


class State(StrEnum):
    """How far a claim was verified, in the words of :class:`da3_runtime.store.manifest.Parity`."""

    VERIFIED = Parity.VERIFIED.value
    PARTLY = "partly verified"
    UNVERIFIED = Parity.UNVERIFIED.value


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Claim:
    """A claim.

    Attributes
    ----------
    what : str
        What is claimed.
    state : State
        How far it was verified.
    where : str
        The machine; empty where nothing was run.
    how : str
        How it was verified, and what was not. A verified claim without tests says that it was seen once.
    figures : str
        Figures, or a page of ``docs`` with them.
    tests : tuple[str, ...]
        Tests that fail if the claim is false, as ``PATH::NAME`` below ``tests``. ``make test``,
        ``make test-long`` or ``make batch`` runs them.
    short : str
        The claim's state in one sentence.
    artefacts : tuple[Kind, ...]
        The kinds of artefact that it is about. A kind is in one claim at most.
    readme : bool
        Whether the README shows the state and the short sentence.
    """

    what: str
    state: State
    where: str
    how: str
    figures: str
    tests: tuple[str, ...]
    short: str = ""
    artefacts: tuple[Kind, ...] = ()
    readme: bool = False


@cache
def claims() -> tuple[Claim, ...]:
    """Every claim."""
    return TypeAdapter(tuple[Claim, ...]).validate_json(PATH.read_bytes())


def experience_with(kind: Kind) -> str:
    """One sentence on how far the project has run artefacts of ``kind``; empty where no claim has it."""
    return next((claim.short for claim in claims() if kind in claim.artefacts), "")
