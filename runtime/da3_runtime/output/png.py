"""Pictures as PNG files, and photos from the plainest of them.

Every row is written as its difference from the one above, which for depth is next to nothing, and
deflated by ISA-L: several times faster than zlib on such data, and smaller than zlib's fast levels.

To read, ISA-L inflates and libspng puts the rows together again, each on its own core where one is idle.
libspng sees nothing of a file but those rows: some at a time are given to it as a PNG of our own,
undeflated.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice

import numpy as np
import pyspng
from isal import igzip_lib, isal_zlib
from numpy.typing import NDArray

from da3_runtime.util.parallel import ahead, on_cores, strips

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NO_FILTER, _UP = 0, 2  # a row as it is; less the row above
_GRAY, _RGB = 0, 2
_LEVEL = 1
# Bytes deflated in one piece. Pieces are of one size wherever they are made: so is the file.
_PIECE = 2**19
_ZLIB_HEADER = b"\x78\x01"  # deflate, a window of 32 kB, the fastest level
_STORED = 2**16 - 1  # bytes of a deflate block that is not compressed
_LAST = struct.pack("<BHH", 1, 0, _STORED)  # such a block without any, which ends a stream
# Bytes of rows put together at once. libspng holds the interpreter's lock, so with fewer the one who
# inflates waits for it too often; with more neither begins early.
_READ = 2**19
_STEP = 2**22  # bytes of a file inflated at once
_BYTES = np.zeros(64, dtype=np.uint8)  # any that fill a register
_CHUNKS = 2**14  # of a photo; who has more is not worth the memory
# Chunks that say how to show the pixels, or nothing about them.
_PLAIN = {b"bKGD", b"cHRM", b"cICP", b"gAMA", b"iCCP", b"pHYs", b"sBIT", b"sRGB", b"tIME"}


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
    header = _header(width, height, bits, colour)
    pixels = _deflated(filtered)
    return b"".join(
        (_SIGNATURE, *_chunk(b"IHDR", header), *_chunk(b"IDAT", pixels), *_chunk(b"IEND", b""))
    )


def _header(width: int, height: int, bits: int, colour: int) -> bytes:
    """What IHDR says of a picture that is not interlaced."""
    return struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


def _deflated(rows: NDArray[np.uint8]) -> bytes:
    """A zlib stream of rows [H, bytes], in pieces that know nothing of each other."""
    parts = list(strips(len(rows), max(1, _PIECE // rows.shape[1])))
    pieces: dict[int, bytes] = {}

    def deflate(part: slice) -> None:
        stream = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
        ending = isal_zlib.Z_FINISH if part.stop == len(rows) else isal_zlib.Z_FULL_FLUSH
        pieces[part.start] = stream.compress(rows[part]) + stream.flush(ending)
        _clear_registers()

    on_cores(deflate, parts)
    checksum = struct.pack(">I", isal_zlib.adler32(rows))
    _clear_registers()
    return b"".join((_ZLIB_HEADER, *(pieces[part.start] for part in parts), checksum))


def _clear_registers() -> None:
    """To be called after ISA-L: it leaves the upper halves of vector registers filled.

    Until some code on the thread clears them (VZEROUPPER), code with SSE, like much of OpenCV's, takes
    twice its time. NumPy's addition of bytes does.
    """
    np.add(_BYTES, 1)


def _chunk(kind: bytes, data: bytes) -> tuple[bytes, ...]:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)


def decode_png(data: bytes, width: int, height: int) -> NDArray[np.uint8] | None:
    """The pixels of an 8-bit RGB PNG of that size, [H, W, 3]; Pillow has read what is before the pixels.

    None where it is of another kind or interlaced, where there are not just so many rows, and where a
    chunk may say anything about the pixels. (ISA-L takes a few streams that zlib finds fault with.)
    """
    chunks = _chunks(data)
    kind, content = next(chunks, (b"", memoryview(b"")))
    if kind != b"IHDR" or content != _header(width, height, 8, _RGB):
        return None
    found = list(islice(chunks, _CHUNKS))
    kinds = [kind for kind, _ in found]
    if b"IDAT" not in kinds or kinds[-1] != b"IEND":
        return None
    first = kinds.index(b"IDAT")
    if not _PLAIN.issuperset(kinds[:first]) or set(kinds[first:-1]) != {b"IDAT"}:
        return None
    try:
        return _decode_rows([pixels for _, pixels in found[first:-1]], width, height)
    except Exception:
        # What is wrong is for Pillow to say; what ISA-L and libspng raise shares no public base class.
        return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and content of each chunk, up to the end or to what is none."""
    view = memoryview(data)
    start = len(_SIGNATURE)
    while start + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        start += 8
        yield kind, view[start : start + size]
        start += size + 4


def _decode_rows(deflated: Iterable[memoryview], width: int, height: int) -> NDArray[np.uint8] | None:
    """Rows as they lie in a PNG, deflated, to pixels."""
    row = 1 + 3 * width
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    done = 0
    with closing(ahead(_inflated(deflated, max(_READ // row, 1) * row))) as inflated:
        for parts in inflated:
            count, rest = divmod(sum(map(len, parts)), row)
            if rest or done + count > height:
                return None
            above = pixels[done - 1] if done else None
            pixels[done : done + count] = _unfiltered(parts, count, width, above)
            done += count
    return pixels if done == height else None


def _inflated(deflated: Iterable[memoryview], size: int) -> Iterator[list[bytes]]:
    """``size`` bytes at a time, in parts, and the rest; raises if the stream is damaged or goes on."""
    # Unlike ISA-L's stand-in for zlib, this one releases the interpreter's lock.
    stream = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_ZLIB)
    parts: list[bytes] = []
    missing = size
    for piece in _joined(deflated):
        if stream.eof:
            raise ValueError("something follows the stream")
        pending = piece
        while not stream.eof and (part := stream.decompress(pending, missing)):
            _clear_registers()
            pending = b""  # it keeps what it has not read
            parts.append(part)
            missing -= len(part)
            if not missing:
                yield parts
                parts, missing = [], size
    if not stream.eof or stream.unused_data:
        raise ValueError("the stream ends too soon, or too late")
    if missing < size:
        yield parts


def _joined(chunks: Iterable[memoryview]) -> Iterator[bytes]:
    """The same bytes in pieces of some size."""
    pieces: list[memoryview] = []
    size = 0
    for piece in (chunk[part] for chunk in chunks for part in strips(len(chunk), _STEP)):
        pieces.append(piece)
        size += len(piece)
        if size >= _STEP:
            yield b"".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield b"".join(pieces)


def _unfiltered(
    rows: list[bytes], count: int, width: int, above: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    """Filtered rows, ``count`` in all, as pixels, [count, W, 3]; raises if a filter is none of PNG's."""
    parts = rows if above is None else [bytes([_NO_FILTER]), above.tobytes(), *rows]
    header = _header(width, count + (above is not None), 8, _RGB)
    blocks = [_ZLIB_HEADER, *(block for part in parts for block in _stored(part)), _LAST]
    png = b"".join(
        (
            _SIGNATURE,
            *_chunk(b"IHDR", header),
            struct.pack(">I", sum(map(len, blocks)) + 4),
            b"IDAT",
            *blocks,
            bytes(4 + 4),  # pyspng has libspng look at no checksum, neither the rows' nor the chunk's
            *_chunk(b"IEND", b""),
        )
    )
    pixels: NDArray[np.uint8] = pyspng.load(png, "RGB")
    return pixels[-count:]


def _stored(data: bytes) -> Iterator[bytes | memoryview]:
    """Deflate blocks that are not compressed."""
    view = memoryview(data)
    for part in strips(len(view), _STORED):
        size = part.stop - part.start
        yield struct.pack("<BHH", 0, size, size ^ _STORED)
        yield view[part]
