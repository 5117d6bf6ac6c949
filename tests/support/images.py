"""Makes image files for tests, well-formed and malformed, and reads images out of responses."""

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.support.paths import PHOTOS

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode(image, fmt="PNG", **options):
    """Bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def base64_text(data):
    """Bytes as a request or a response carries them."""
    return base64.b64encode(data).decode()


def image_of(output, name="image_base64"):
    """The image in a field of a response."""
    return Image.open(io.BytesIO(base64.b64decode(output[name])))


def png_chunk(name, data):
    """A chunk of a PNG file, with its length and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with_wrong_size():
    """A PNG whose header announces 4000 x 4000 pixels, with the data of a single row."""
    header = struct.pack(">IIBBBBB", 4000, 4000, 8, 2, 0, 0, 0)
    row = zlib.compress(bytes(12001))
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", row) + png_chunk(b"IEND", b"")


def tiff_file(values, order="<", **tags):
    """An uncompressed TIFF of an array [H, W] or [H, W, samples]; tags by number, as ``t262=0``."""
    values = np.atleast_3d(values)
    height, width, samples = values.shape
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    fields = {
        256: width, 257: height, 258: (values.dtype.itemsize * 8,) * samples, 259: 1,
        262: 2 if samples > 2 else 1, 273: 8, 277: samples, 278: height, 279: len(pixels),
        339: (kind,) * samples, **{int(name[1:]): value for name, value in tags.items()},
    }  # fmt: skip
    entries, extra, end = b"", b"", 8 + len(pixels) + 2 + 12 * len(fields) + 4
    for tag, value in sorted(fields.items()):
        many = value if isinstance(value, tuple) else (value,)
        letter, number = ("f", 11) if isinstance(many[0], float) else ("L", 4)
        data = struct.pack(f"{order}{len(many)}{letter}", *many)
        if len(many) > 1:
            data, extra = struct.pack(f"{order}L", end + len(extra)), extra + data
        entries += struct.pack(f"{order}HHL", tag, number, len(many)) + data
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8 + len(pixels))
    return head + pixels + struct.pack(f"{order}H", len(fields)) + entries + bytes(4) + extra


# A photo as a request carries it.
PHOTO = base64_text((PHOTOS / "cat.jpg").read_bytes())
