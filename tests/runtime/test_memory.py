"""The peak memory of a request stays within its documented bound, for large images and for malicious files.

Some formats and attacks run by default. ``make memory`` sets MEMORY=1, which runs all of them.
"""

import base64
import io
import os
import re
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from da3_runtime.output.encode import Output
from tests.support import images
from tests.support.images import base64_text, png_chunk, tiff_file
from tests.support.paths import ROOT
from tests.support.processes import Server

SIDE = 1152
MAX_BYTES = 16 * 2**20
# The documented bound in bytes: per pixel of the image, per byte of its file, and for everything else.
PER_PIXEL, PER_BYTE, REST = 40, 4, 32 * 2**20
PER_POINT = 700
SHORT = {
    "JPEG",
    "PNG, transparent",
    "TIFF, LZW",
    "header of a giant",
    "compressed text",
    "GIF of many frames",
}
LONG = bool(os.environ.get("MEMORY"))

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="needs Linux, whose peak memory of a process can be read and reset",
)


class Watched:
    """A server, and the memory that a request takes beyond that of the idle server."""

    def __init__(self, server):
        self.server = server
        self.proc = Path(f"/proc/{server.process.pid}")
        assert self.ask(encode(noise(200, 200), "PNG")).status_code == 200
        self.before = self.status_of("VmRSS")

    def ask(self, data, **fields):
        fields = {"processing_res": 84, "outputs": list(Output), **fields}
        return self.server.ask(image_base64=base64_text(data), **fields)

    def status_of(self, field):
        line = re.search(rf"^{field}:\s+(\d+) kB", (self.proc / "status").read_text(), re.MULTILINE)
        return int(line[1]) * 1024

    def peak(self, data, **fields):
        """Peak memory during a request in bytes, and the response."""
        (self.proc / "clear_refs").write_text("5")
        before = self.status_of("VmRSS")
        response = self.ask(data, **fields)
        return self.status_of("VmHWM") - before, response


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
    """Remove Pillow's global pixel limit, which the settings of another test may have set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        yield


def encode(array, fmt, mode=None, **options):
    image = Image.fromarray(array)
    return images.encode(image.convert(mode) if mode else image, fmt, **options)


def png_with(*chunks):
    """A small PNG with ``chunks`` after its header."""
    plain = encode(noise(100, 100), "PNG")
    return plain[:33] + b"".join(chunks) + plain[33:]


def gif_of_frames(count):
    """A GIF that repeats one frame ``count`` times."""
    data = encode(np.zeros((SIDE, SIDE), np.uint8), "GIF")
    first = data.index(b"\x2c\x00\x00\x00\x00")
    return data[:-1] + data[first:-1] * count + b";"


def animated_png(count):
    first, *others = (Image.new("L", (SIDE, SIDE), number % 256) for number in range(count))
    stream = io.BytesIO()
    first.save(stream, "PNG", save_all=True, append_images=others)
    return stream.getvalue()


def tiff(*more):
    """A TIFF of 100 x 100 gray pixels with additional tags: (number, type, count, value)."""
    size = 100
    known = [
        (256, 3, 1, size), (257, 3, 1, size), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
        (277, 3, 1, 1), (278, 3, 1, size), (279, 4, 1, size * size),
    ]  # fmt: skip
    tags = sorted([*known, *more])
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\x00" + struct.pack("<I", 8 + size * size) + bytes(size * size) + directory


def directories(count):
    """A TIFF with ``count`` additional directories; the last one points to itself."""
    made = bytearray(tiff())
    for _ in range(count):
        made += struct.pack("<I", len(made) + 4) + struct.pack("<HHHII", 1, 256, 3, 1, 100)
    return bytes(made + struct.pack("<I", len(made) - 14))


def tags(count):
    """A TIFF with ``count`` additional tags, each with the largest size that a tag can announce."""
    return tiff(*[(1000 + number, 7, 2**31, 8) for number in range(count)]) + bytes(4)


def deep_png(channels):
    """A PNG of 16 bits a sample."""
    values = noise(SIDE, SIDE, channels).astype(np.uint16) * 257
    return cv2.imencode(".png", values, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def lzw_tiff():
    """A TIFF of 16 bits a sample."""
    values = noise(SIDE, SIDE).astype(np.uint16) * 257
    return cv2.imencode(".tiff", values, [cv2.IMWRITE_TIFF_COMPRESSION, 5])[1].tobytes()


def deflated_tiff():
    """A TIFF of three 64-bit floating-point samples a pixel, in one strip that compresses well."""
    whole = tiff_file(np.zeros((2, 2, 3)), t256=SIDE, t257=SIDE, t278=SIDE, t259=8, t273=8, t279=10**6)
    strip = zlib.compress(bytes(SIDE * SIDE * 24 - 8) + struct.pack("<d", 1.0))
    assert len(strip) < 10**6
    start = len(whole)
    at = whole.index(struct.pack("<HHLL", 273, 4, 1, 8))
    return whole[: at + 8] + struct.pack("<L", start) + whole[at + 12 :] + strip.ljust(10**6, b"\0")


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
    "PNG, 16 bits, transparent": lambda: deep_png(4),
    "TIFF, 16 bits, LZW": lambda: lzw_tiff(),
    "TIFF, 64-bit float, deflate": lambda: deflated_tiff(),
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
    "compressed text": lambda: png_with(png_chunk(b"zTXt", b"a\x00\x00" + BOMB)),
    "compressed profile": lambda: png_with(png_chunk(b"iCCP", b"a\x00\x00" + BOMB)),
    "much compressed text": lambda: png_with(*[png_chunk(b"zTXt", b"a\x00\x00" + BOMB)] * 20),
    "pixels beyond the image": lambda: png_with(png_chunk(b"IDAT", BOMB)),
    "TIFF of many directories": lambda: directories(200_000),
    "TIFF of large tags": lambda: tags(5000),
    "JPEG of many scans": lambda: many_scans(300),
    "JPEG of many markers": lambda: b"\xff\xd8" + b"\xff\xe1\xff\xffExif\x00\x00" * 100_000,
}


def many_scans(count):
    """A progressive JPEG that repeats its last scan ``count`` times."""
    data = encode(noise(SIDE, SIDE, 1), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2][:2000] * count + data[-2:]


def check(watched, data, pixels):
    peak, response = watched.peak(data)
    assert peak <= PER_PIXEL * pixels + PER_BYTE * len(data) + REST
    return response


def selected(names):
    """Parameters; those outside SHORT are skipped unless MEMORY is set."""
    skip = pytest.mark.skipif(not LONG, reason="long run: make memory")
    return [pytest.param(name, marks=[] if name in SHORT else [skip]) for name in names]


@pytest.mark.parametrize("name", selected(IMAGES))
def test_an_image_at_the_limits_stays_within_the_bound(watched, name):
    data = IMAGES[name]()
    output = check(watched, data, SIDE * SIDE).json()["output"]
    assert output["width"] * output["height"] in (SIDE * SIDE, 256 * 256)


@pytest.mark.parametrize("name", selected(ATTACKS))
def test_a_malicious_file_stays_within_the_bound(watched, name):
    data = ATTACKS[name]()
    assert len(data) <= MAX_BYTES
    response = check(watched, data, SIDE * SIDE)
    assert response.status_code in (200, 413, 415, 422), response.text


def test_memory_kept_after_requests_is_at_most_that_of_two_requests(watched):
    """Runs after all of the above, and before what takes more."""
    data = IMAGES["PNG"]()
    for _ in range(4):
        watched.ask(data)
    kept = watched.status_of("VmRSS") - watched.before
    assert kept <= 2 * (PER_PIXEL * SIDE * SIDE + REST)


def test_the_points_of_a_small_photo_stay_within_the_bound(watched):
    data, side = encode(noise(200, 200), "PNG"), 700
    fields = {"processing_res": side, "points_confidence": 0, "points_edge": 0}
    watched.ask(data, **fields, outputs=["camera"])  # the network's own memory
    peak, response = watched.peak(data, **fields, outputs=["glb", "ply", "colmap", "scene_npz"])
    ply = base64.b64decode(response.json()["output"]["ply_base64"])
    assert f"element vertex {side * side}\n".encode() in ply
    assert peak <= PER_POINT * side * side + REST


def test_the_documentation_gives_the_same_bound():
    words = f"{PER_PIXEL} bytes for every pixel and {PER_BYTE} for every byte"
    page = (ROOT / "docs" / "queues.md").read_text()
    assert words in page
    assert f"{PER_POINT} bytes for every point" in page
