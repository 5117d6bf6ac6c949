"""What travels between the stages of a batch: pieces of a source shard, 64 photos at most."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from da3_runtime.errors import DA3Error
from da3_runtime.inference.batcher import Share
from da3_runtime.inference.estimator import Prepared
from da3_runtime.output.run_manifest import Identity
from da3_runtime.util.tally import Tally

JSON = dict[str, object]

PHOTOS = 64  # of a piece, at most
BYTES = 64 * 2**20  # of encoded photos in a piece; a larger photo is one of its own


class Row(NamedTuple):
    """A photo of the source.

    Attributes
    ----------
    photo : Identity
        Its id, and the state of its file.
    stem : str
        Path of its results below the destination or in a tar, without their endings.
    ending : str
        Of its name, in lower case; empty if it has none.
    image : bytes | str
        The encoded photo, or the address to get it from.
    error : str
        Why it cannot be read; empty if it can.
    name : str
        Name of its file, for outputs that contain it; empty if it is not known.
    """

    photo: Identity
    stem: str
    ending: str = ""
    image: bytes | str = b""
    error: str = ""
    name: str = ""


def escaped(text: str) -> str:
    """A text in which anything that UTF-8 lacks is escaped; names of files may have other bytes."""
    return text.encode(errors="backslashreplace").decode()


class Work(NamedTuple):
    """A photo on its way through the stages; ``error`` is set if one of them failed."""

    row: Row
    prepared: Prepared | None = None
    share: Share | None = None
    error: str = ""


class Piece(NamedTuple):
    """Consecutive photos of one shard.

    Attributes
    ----------
    shard : str
        Name of the shard.
    number : int
        The piece's number in it.
    rows : Sequence[Any]
        :class:`Row`, from the second stage on :class:`Work`.
    total : int | None
        At the end of the shard, in a piece without photos: how many pieces it has.
    error : str
        Why the rest of the shard cannot be read now.
    begun : float
        When the network began with it, in seconds since 1970.
    ended : DA3Error | None
        Why the whole run must end.
    """

    shard: str
    number: int
    rows: Sequence[Any] = ()
    total: int | None = None
    error: str = ""
    begun: float = 0.0
    ended: DA3Error | None = None

    def packed(self) -> dict[str, bytes]:
        """The piece as a row of a Ray dataset. One column of bytes needs no conversion."""
        return {"piece": pickle.dumps(self, protocol=5)}

    @classmethod
    def unpacked(cls, row: Mapping[str, bytes]) -> Piece:
        """The piece in a row of a Ray dataset, which stages of this run wrote."""
        piece: Piece = pickle.loads(row["piece"])  # noqa: S301
        return piece


@dataclass
class Done(Tally):
    """What became of a piece.

    Attributes
    ----------
    lines : list[JSON]
        Lines of the manifest that the driver writes.
    begun : float
        As in :class:`Piece`.
    """

    lines: list[JSON] = field(default_factory=list)
    begun: float = 0.0
