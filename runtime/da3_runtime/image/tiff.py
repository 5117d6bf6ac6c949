"""TIFFs of more than 8 bits a sample, or of signed or floating-point samples -> samples.

Pillow decodes the other TIFFs. It reads some of these, but cuts or wraps their samples.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2, TiffImageFile

from da3_runtime.errors import ImageError, ImageFormatError
from da3_runtime.image.samples import Samples

# Tags of TIFF 6.0.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_FILL_ORDER, _STRIP_OFFSETS, _SAMPLES, _STRIP_SIZES = 266, 273, 277, 279
_SMALLEST, _LARGEST, _PLANAR, _PREDICTOR = 280, 281, 284, 317
_EXTRA, _SAMPLE_FORMAT, _SMALLEST_ANY_TYPE, _LARGEST_ANY_TYPE = 338, 339, 340, 341
_DAMAGED = "The TIFF is damaged or cut short and cannot be decoded: send the whole file."
_PART = 2**20  # bytes that are inflated at once
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
# The above, orientation, color map, tiles, tables of JPEG and fax, and the color space YCbCr.
_NEEDED = {
    *range(254, 260), 262, 266, 273, 274, *range(277, 282), 284, 292, 293, 317, 320, *range(322, 326),
    332, 333, 334, *range(338, 342), 347, *range(512, 522), *range(529, 533),
}  # fmt: skip
_PREMULTIPLIED, _ALPHA = 1, 2  # kinds of an extra sample
_UNCOMPRESSED, _DEFLATE = 1, (8, 32946)
_MAX_BITS = 3 * 64  # of a pixel: bounds the memory of the samples
_RIGHT_IN_PILLOW = {("u", 16), ("f", 32)}  # it wraps other samples
_KINDS = {1: "u", 2: "i", 3: "f"}
# OpenCV's decoder of TIFF.
_OPENCV_TYPES = {"u2", "i1", "i2", "i4", "f4", "f8"}
_OPENCV_SAMPLES = {1, 3, 4}
_OPENCV_COMPRESSIONS = {_UNCOMPRESSED, 5, *_DEFLATE, 32773}  # 5: LZW, 32773: PackBits


class PlainTiff(TiffImageFile):
    """Pillow's decoder without its global pixel limit and its rotation, which fails on damaged EXIF."""

    def load_prepare(self) -> None:
        """Allocate the image; the caller has checked its size."""
        if self._im is None:
            self.im = Image.new(self.mode, self._tile_size).im
        super().load_prepare()

    def load_end(self) -> None:
        """Keep the pixels as stored."""
        self._size = self.im.size


@dataclass(frozen=True)
class Layout:
    """How the pixels of a TIFF's first image are stored.

    Attributes
    ----------
    width, height : int
        Size as stored, in pixels.
    samples : int
        Samples of a pixel.
    bits : int
        Bits of a sample; 0 if they differ.
    kind : str
        ``u``, ``i`` or ``f``: unsigned or signed integers, or floating point; empty if they differ.
    photometric, compression : int
        Values of the tags of these names.
    tags : Mapping[int, Any]
        All tags.
    order : str
        Byte order, as NumPy writes it.
    """

    width: int
    height: int
    samples: int
    bits: int
    kind: str
    photometric: int
    compression: int
    tags: Mapping[int, Any]
    order: str

    @property
    def is_wide(self) -> bool:
        """Whether :func:`read_wide` and not Pillow reads it."""
        is_byte = self.kind == "u" and 0 < self.bits <= 8
        return not is_byte and self.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB)

    @property
    def words(self) -> str:
        """Samples and compression in words."""
        names = {"u": "uint", "i": "int", "f": "float"}
        each = (
            f"{names[self.kind]}{self.bits}" if self.kind and self.bits else "samples of several types"
        )
        if self.compression == _UNCOMPRESSED:
            return f"{self.samples} x {each}"
        how = COMPRESSION_INFO.get(self.compression, f"compression {self.compression}")
        return f"{self.samples} x {each}, {how.removeprefix('tiff_')}"


def trimmed(data: bytes) -> bytes:
    """A TIFF with only its first directory, and of that only the tags that its pixels need.

    Damage to any other tag would make Pillow refuse the file. Other bytes are returned as they are.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return data
    try:
        (start,) = struct.unpack_from(f"{order}L", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        entries = [data[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
        needed = [each for each in entries if struct.unpack_from(f"{order}H", each)[0] in _NEEDED]
    except struct.error:
        return data
    directory = struct.pack(f"{order}H", len(needed)) + b"".join(needed) + bytes(4)
    return b"".join((data[:start], directory, data[start + len(directory) :]))


def layout_of(data: bytes) -> Layout | None:
    """The layout of a TIFF; None if the file is none, or too damaged to tell."""
    if data[:4] not in _MAGIC:
        return None
    try:
        head = data[: 16 if b"+" in data[:4] else 8]
        tags = ImageFileDirectory_v2(head)
        stream = io.BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        bits, formats = (_as_tuple(tags.get(tag, 1)) for tag in (_BITS, _SAMPLE_FORMAT))
        return Layout(
            int(tags[_WIDTH]),
            int(tags[_HEIGHT]),
            int(tags.get(_SAMPLES, 1)),
            bits[0] if len(set(bits)) == 1 else 0,
            _KINDS.get(formats[0], "u") if len(set(formats)) == 1 else "",
            int(tags.get(_PHOTOMETRIC, 0)),
            int(tags.get(_COMPRESSION, 1)),
            tags,
            "<" if data[:1] == b"I" else ">",
        )
    except Exception:
        # Pillow's decoders raise nearly anything on damaged files.
        return None


def unsupported(layout: Layout) -> ImageFormatError:
    """The error about a TIFF that is sound but cannot be read."""
    return ImageFormatError(
        f"The image is a TIFF of a kind that is not supported ({layout.words}): send it as PNG, or as a "
        "TIFF with 8-bit samples."
    )


def read_wide(data: bytes, layout: Layout) -> Samples | None:
    """The samples of a TIFF whose layout is wide, as stored; the caller has checked its size.

    None leaves it to Pillow, which knows more compressions.

    Raises
    ------
    ImageFormatError
        If samples of this kind cannot be read; the message names the kind.
    ImageError
        If it is damaged.
    """
    colors = 3 if layout.photometric == _RGB else 1
    values = None
    if colors <= layout.samples <= 4 and layout.samples * layout.bits <= _MAX_BITS:
        values = _values(data, layout)
    if values is None:
        if (layout.kind, layout.bits) not in _RIGHT_IN_PILLOW:
            raise unsupported(layout)
        return None
    extra = (*_as_tuple(layout.tags.get(_EXTRA)), 0)[0]
    if layout.samples == 4 and colors == 3 and _EXTRA not in layout.tags:
        extra = _ALPHA  # Pillow takes it so, too
    has_alpha = extra in (_PREMULTIPLIED, _ALPHA) and layout.samples > colors
    low, high = _stated_range(layout)
    return Samples(
        values[:, :, 0] if colors == 1 else values[:, :, :3],
        values[:, :, colors] if has_alpha else None,
        extra == _PREMULTIPLIED,
        low,
        high,
        layout.photometric == _WHITE_IS_ZERO,
    )


def _values(data: bytes, layout: Layout) -> NDArray[Any] | None:
    """All samples, [H, W, samples]; None if there is no decoder for them here."""
    name = f"{layout.kind}{layout.bits // 8}"
    if layout.bits == 12 and layout.samples == 1:
        return _by_pillow(data)
    if layout.bits in (8, 16, 32, 64) and name not in ("1", "2", "4", "8", "f1"):
        values = _by_numpy(data, layout, np.dtype(layout.order + name))
        if values is not None:
            return values
        is_known = layout.compression in _OPENCV_COMPRESSIONS and layout.samples in _OPENCV_SAMPLES
        if is_known and name in _OPENCV_TYPES:
            return _by_opencv(data, layout)
    return None


def _by_numpy(data: bytes, layout: Layout, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Samples that are not compressed, or only deflated; None for other files."""
    tags = layout.tags
    is_simple = tags.get(_PREDICTOR, 1) == tags.get(_FILL_ORDER, 1) == 1 and _STRIP_OFFSETS in tags
    if not is_simple or layout.compression not in (_UNCOMPRESSED, *_DEFLATE):
        return None
    height, width, samples = layout.height, layout.width, layout.samples
    values = np.zeros(height * width * samples, dtype)
    room = values.view(np.uint8).data
    filled = 0
    strips = zip(_as_tuple(tags[_STRIP_OFFSETS]), _as_tuple(tags.get(_STRIP_SIZES)), strict=False)
    for start, size in strips:
        strip = memoryview(data)[start : start + size]
        for part in (strip,) if layout.compression == _UNCOMPRESSED else _inflated(strip):
            part = part[: len(room) - filled]
            room[filled : filled + len(part)] = part
            filled += len(part)
            if filled == len(room):
                break
    if filled < len(room):
        raise ImageError(_DAMAGED)
    if tags.get(_PLANAR, 1) == 2:
        return values.reshape(samples, height, width).transpose(1, 2, 0)
    return values.reshape(height, width, samples)


def _inflated(strip: memoryview) -> Iterator[bytes]:
    """What a deflated strip holds, in parts, so that it needs little memory beside the image."""
    inflate, rest = zlib.decompressobj(), bytes(strip)
    while not inflate.eof and (part := inflate.decompress(rest, _PART)):
        yield part
        rest = inflate.unconsumed_tail


def _by_opencv(data: bytes, layout: Layout) -> NDArray[Any]:
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.shape[:2] != (layout.height, layout.width):
        raise ImageError(_DAMAGED)
    values = np.atleast_3d(values)
    if values.shape[2] > 1:
        # OpenCV's order is BGR. A swap in place needs less memory than a copy.
        blue = values[:, :, 0].copy()
        values[:, :, 0] = values[:, :, 2]
        values[:, :, 2] = blue
    return values


def _by_pillow(data: bytes) -> NDArray[Any] | None:
    try:
        image = PlainTiff(io.BytesIO(data))
    except SyntaxError:  # Pillow's word for a kind that it does not know
        return None
    with image:
        return np.asarray(image)[:, :, None]


def _stated_range(layout: Layout) -> tuple[float | None, float | None]:
    """Smallest and largest value of a sample, if the file states a range narrower than its type's."""
    high = float(2**layout.bits - 1) if layout.kind == "u" and layout.bits else None
    tags = layout.tags
    smallest = _as_tuple(tags.get(_SMALLEST_ANY_TYPE, tags.get(_SMALLEST)))
    largest = _as_tuple(tags.get(_LARGEST_ANY_TYPE, tags.get(_LARGEST)))
    return (
        min(map(float, smallest)) if smallest else None,
        max(map(float, largest)) if largest else high,
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
