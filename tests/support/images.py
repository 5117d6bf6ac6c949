"""Makes image files for tests, well-formed and malformed, and reads images out of responses."""

import base64
import io
import struct
import zlib

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


# A photo as a request carries it.
PHOTO = base64_text((PHOTOS / "cat.jpg").read_bytes())
