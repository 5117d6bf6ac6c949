"""Pictures as PNG files.

Every row is stored as its difference from the one above, which for depth is next to nothing, and
deflated by ISA-L: several times faster than zlib on such data, and smaller than zlib's fast levels.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from runtime.strips import on_cores, strips

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP = 2  # the filter that subtracts the row above
_GRAY, _RGB = 0, 2
_LEVEL = 1
# Bytes deflated in one piece. Pieces are of one size wherever they are made: so is the file.
_PIECE = 2**19
_ZLIB_HEADER = b"\x78\x01"  # deflate, a window of 32 kB, the fastest level


def encode_png(picture: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """PNG bytes of a gray [H, W], 8 or 16 bits, or an 8-bit RGB [H, W, 3] picture."""
    height, width = picture.shape[:2]
    samples = np.ascontiguousarray(picture, dtype=picture.dtype.newbyteorder(">"))
    rows = samples.view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, 1 + rows.shape[1]), dtype=np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    bits, colour = 8 * picture.itemsize, _RGB if picture.ndim == 3 else _GRAY
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = _deflated(filtered)
    return b"".join(
        (_SIGNATURE, *_chunk(b"IHDR", header), *_chunk(b"IDAT", pixels), *_chunk(b"IEND", b""))
    )


def _deflated(rows: NDArray[np.uint8]) -> bytes:
    """A zlib stream of rows [H, bytes], in pieces that know nothing of each other."""
    parts = list(strips(len(rows), max(1, _PIECE // rows.shape[1])))
    pieces: dict[int, bytes] = {}

    def deflate(part: slice) -> None:
        stream = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
        ending = isal_zlib.Z_FINISH if part.stop == len(rows) else isal_zlib.Z_FULL_FLUSH
        pieces[part.start] = stream.compress(rows[part]) + stream.flush(ending)

    on_cores(deflate, parts)
    checksum = struct.pack(">I", isal_zlib.adler32(rows))
    return b"".join((_ZLIB_HEADER, *(pieces[part.start] for part in parts), checksum))


def _chunk(kind: bytes, data: bytes) -> tuple[bytes, ...]:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)
