"""What a request takes of a server's memory at most: images at the limits in every format, and files made to
take more.
"""

import base64
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from da3_runtime.output.encode import Output
from tests.conftest import ROOT, Server
from tests.runtime.test_http_server import chunk

SIDE = 1152
MAX_BYTES = 16 * 2**20
# The bound of docs/queues.md, in bytes: for a pixel, for a byte of the image, and for everything else.
PER_PIXEL, PER_BYTE, REST = 40, 4, 32 * 2**20

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads and resets Linux's own peak of memory"
)


class Watched:
    """A server, and how much more memory a request takes than it held before."""

    def __init__(self, server):
        self.server = server
        self.proc = Path(f"/proc/{server.process.pid}")
        assert self.ask(encode(noise(200, 200), "PNG")).status_code == 200
        self.before = self.status_of("VmRSS")

    def ask(self, data):
        text = base64.b64encode(data).decode()
        return self.server.ask(image_base64=text, processing_res=84, outputs=list(Output))

    def status_of(self, field):
        line = re.search(rf"^{field}:\s+(\d+) kB", (self.proc / "status").read_text(), re.MULTILINE)
        return int(line[1]) * 1024

    def peak(self, data):
        """Bytes it took at most during a request, and the answer."""
        (self.proc / "clear_refs").write_text("5")
        before = self.status_of("VmRSS")
        answer = self.ask(data)
        return self.status_of("VmHWM") - before, answer


@pytest.fixture(scope="module")
def watched(engine):
    server = Server(
        "serve",
        ENGINE_DIR=str(engine.engine_dir),
        MAX_IMAGE_PIXELS=str(SIDE * SIDE),
        MAX_IMAGE_BYTES=str(MAX_BYTES),
    )
    server.wait()
    yield Watched(server)
    server.stop()


def noise(width, height, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8).squeeze()


@pytest.fixture(scope="module", autouse=True)
def pillow():
    """Pillow without the limit that another test's settings may have left it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        yield


def encode(array, fmt, mode=None, **options):
    stream = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, fmt, **options)
    return stream.getvalue()


def png_with(*chunks):
    """A small PNG with these chunks behind its header."""
    plain = encode(noise(100, 100), "PNG")
    return plain[:33] + b"".join(chunks) + plain[33:]


def gif_of_frames(count):
    """One picture whose frame comes again and again."""
    data = encode(np.zeros((SIDE, SIDE), np.uint8), "GIF")
    first = data.index(b"\x2c\x00\x00\x00\x00")
    return data[:-1] + data[first:-1] * count + b";"


def animated_png(count):
    first, *others = (Image.new("L", (SIDE, SIDE), number % 256) for number in range(count))
    stream = io.BytesIO()
    first.save(stream, "PNG", save_all=True, append_images=others)
    return stream.getvalue()


def tiff(*more):
    """A TIFF of 100 x 100 gray pixels with more tags: (number, type, count, value)."""
    size = 100
    known = [
        (256, 3, 1, size), (257, 3, 1, size), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
        (277, 3, 1, 1), (278, 3, 1, size), (279, 4, 1, size * size),
    ]  # fmt: skip
    tags = sorted([*known, *more])
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\x00" + struct.pack("<I", 8 + size * size) + bytes(size * size) + directory


def directories(count):
    """A TIFF with that many more directories behind its first, the last of which leads to itself."""
    made = bytearray(tiff())
    for _ in range(count):
        made += struct.pack("<I", len(made) + 4) + struct.pack("<HHHII", 1, 256, 3, 1, 100)
    return bytes(made + struct.pack("<I", len(made) - 14))


def tags(count):
    """A TIFF with many more tags, each as large as a tag may say it is."""
    return tiff(*[(1000 + number, 7, 2**31, 8) for number in range(count)]) + bytes(4)


BOMB = zlib.compress(bytes(2**27))
IMAGES = {
    "JPEG": lambda: encode(noise(SIDE, SIDE), "JPEG"),
    "JPEG, progressive": lambda: encode(noise(SIDE, SIDE), "JPEG", progressive=True, subsampling=0),
    "JPEG, CMYK": lambda: encode(noise(SIDE, SIDE), "JPEG", "CMYK"),
    "PNG": lambda: encode(noise(SIDE, SIDE), "PNG", compress_level=1),
    "PNG, transparent": lambda: encode(noise(SIDE, SIDE, 4), "PNG", compress_level=1),
    "PNG, 16 bits": lambda: encode(
        noise(SIDE, SIDE, 1).astype(np.uint16) * 257, "PNG", compress_level=1
    ),
    "PNG, palette": lambda: encode(np.zeros((SIDE, SIDE), np.uint8), "PNG", "P", transparency=0),
    "WebP": lambda: encode(noise(SIDE, SIDE), "WEBP", method=0),
    "WebP, transparent": lambda: encode(
        noise(SIDE, SIDE, 4), "WEBP", lossless=True, method=0, quality=0
    ),
    "BMP": lambda: encode(noise(SIDE, SIDE), "BMP"),
    "TIFF, LZW": lambda: encode(noise(SIDE, SIDE), "TIFF", compression="tiff_lzw"),
    "TIFF, CMYK": lambda: encode(noise(SIDE, SIDE), "TIFF", "CMYK"),
    "GIF": lambda: encode(noise(SIDE, SIDE, 1), "GIF"),
    "AVIF": lambda: encode(noise(SIDE, SIDE), "AVIF", speed=10, quality=50),
    "ICO": lambda: encode(noise(256, 256), "ICO"),
}
ATTACKS = {
    "header of a giant": lambda: (
        png_with()[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + png_with()[24:]
    ),
    "a pixel too many": lambda: encode(np.zeros((SIDE, SIDE + 1), np.uint8), "PNG"),
    "GIF of many frames": lambda: gif_of_frames(3000),
    "PNG of many frames": lambda: animated_png(12),
    "compressed text": lambda: png_with(chunk(b"zTXt", b"a\x00\x00" + BOMB)),
    "compressed profile": lambda: png_with(chunk(b"iCCP", b"a\x00\x00" + BOMB)),
    "much compressed text": lambda: png_with(*[chunk(b"zTXt", b"a\x00\x00" + BOMB)] * 20),
    "pixels beyond the picture": lambda: png_with(chunk(b"IDAT", BOMB)),
    "TIFF of many directories": lambda: directories(200_000),
    "TIFF of large tags": lambda: tags(5000),
    "JPEG of many scans": lambda: many_scans(300),
    "JPEG of many markers": lambda: b"\xff\xd8" + b"\xff\xe1\xff\xffExif\x00\x00" * 100_000,
}


def many_scans(count):
    """A progressive JPEG whose last scan comes again and again."""
    data = encode(noise(SIDE, SIDE, 1), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2][:2000] * count + data[-2:]


def check(watched, data, pixels):
    peak, answer = watched.peak(data)
    assert peak <= PER_PIXEL * pixels + PER_BYTE * len(data) + REST
    return answer


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_at_the_limits_takes_no_more_than_is_said(watched, name):
    data = IMAGES[name]()
    output = check(watched, data, SIDE * SIDE).json()["output"]
    assert output["width"] * output["height"] in (SIDE * SIDE, 256 * 256)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_file_made_to_take_more_takes_no_more_than_is_said(watched, name):
    data = ATTACKS[name]()
    assert len(data) <= MAX_BYTES
    answer = check(watched, data, SIDE * SIDE)
    assert answer.status_code in (200, 413, 415, 422), answer.text


def test_what_is_kept_for_the_next_requests_is_no_more_than_two_of_them_take(watched):
    """After all of the above; MAX_CONCURRENCY is 2."""
    data = IMAGES["PNG"]()
    for _ in range(4):
        watched.ask(data)
    kept = watched.status_of("VmRSS") - watched.before
    assert kept <= 2 * (PER_PIXEL * SIDE * SIDE + REST)


def test_the_documentation_gives_the_same_bound():
    words = f"{PER_PIXEL} bytes for every pixel and {PER_BYTE} for every byte"
    assert words in (ROOT / "docs" / "queues.md").read_text()
