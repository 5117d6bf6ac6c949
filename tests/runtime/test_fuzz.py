"""Mutated images and requests through the whole service: an answer, or one sentence with the right status.

A few of each kind, always the same; ``make fuzz`` runs FUZZ of each, other ones every time, and writes what
came of them to FUZZ_OUT.
"""

import base64
import io
import json
import logging
import os
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.record import installed, provenance
from benchmarks.serving import StandIn, prepared
from da3_runtime.api.request import FIELDS
from da3_runtime.output.encode import Output
from da3_runtime.settings import Settings
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.variants import Head, find_variant
from tests.conftest import NANO, resident_mb

SIDE = 84  # the smallest the network takes
LIMITS = {"max_image_bytes": 2**20, "max_image_pixels": 2**22}
EXAMPLES = int(os.environ.get("FUZZ") or 80)
LONG = EXAMPLES > 1000
# What an error may have for a status: never 500, which is what nobody has thought of.
TOLD = {400, 413, 415, 422}
ROOM_MB = 8  # for what libraries keep
GROWN: list[float] = []
OUTCOMES: Counter[str] = Counter()

many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


class Echo(StandIn):
    """A network whose depth has the size of its input."""

    def run(self, images):
        self.depth = np.ones(images.shape[1:3], np.float32)
        return super().run(images)


def service():
    variant = find_variant(NANO)
    network = Echo(np.ones((SIDE, SIDE), np.float32), 0, 0)
    folder = EngineFolder(variant, Head.DPT, Path("nowhere"), None)
    return prepared({variant.graphs[0].name: network}, folder, Settings.of(model_id=NANO, **LIMITS))


SERVICE = service()


def seeds():
    """An image of every format and mode that is read, and what phones put beside one."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(
        rng.integers(0, 256, (50, 60, 3), np.uint8).repeat(2, 0).repeat(2, 1)[:48, :48]
    )
    wide = Image.fromarray(rng.integers(0, 65536, (48, 48), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x8769] = {0xA405: 26, 0x920A: 4.2}
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    made = [
        (rgb, "JPEG", {"exif": exif, "quality": 80}),
        (rgb, "JPEG", {"progressive": True, "subsampling": 0}),
        (rgb.convert("L"), "JPEG", {}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {"exif": exif}),
        (rgb.convert("RGBA"), "PNG", {}),
        (rgb.quantize(16), "PNG", {"transparency": 3}),
        (wide, "PNG", {}),
        (rgb.convert("1"), "PNG", {}),
        (rgb, "PNG", frames),
        (rgb, "WEBP", {"lossless": True, "exif": exif}),
        (rgb.convert("RGBA"), "WEBP", {"quality": 60}),
        (rgb, "BMP", {}),
        (rgb.quantize(200), "BMP", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw", **frames}),
        (rgb, "TIFF", {"compression": "tiff_deflate"}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (wide, "TIFF", {}),
        (rgb, "GIF", frames),
        (rgb, "ICO", {"sizes": [(16, 16), (48, 48)]}),
        (rgb, "AVIF", {"quality": 60}),
    ]
    found = []
    for image, fmt, options in made:
        stream = io.BytesIO()
        image.save(stream, fmt, **options)
        found.append(stream.getvalue())
    return found


SEEDS = seeds()
WORDS = [
    b"\x00" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x01",
    b"\x80\x00",
]

share = st.floats(0, 1, exclude_max=True)
mutation = st.one_of(
    st.tuples(st.just("flip"), share, st.integers(0, 7)),
    st.tuples(
        st.just("write"), share, st.one_of(st.sampled_from(WORDS), st.binary(min_size=1, max_size=8))
    ),
    st.tuples(st.just("insert"), share, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("cut"), share, st.integers(1, 200)),
    st.tuples(st.just("repeat"), share, st.integers(1, 200)),
    st.tuples(st.just("end"), share, st.none()),
    st.tuples(st.just("splice"), share, st.integers(0, len(SEEDS) - 1)),
)


def mutated(data, mutations):
    data = bytearray(data)
    for kind, where, what in mutations:
        at = int(where * len(data))
        match kind:
            case "flip" if data:
                data[at] ^= 1 << what
            case "write":
                data[at : at + len(what)] = what
            case "insert":
                data[at:at] = what
            case "cut":
                del data[at : at + what]
            case "repeat":
                data[at:at] = data[at : at + what]
            case "end":
                del data[at:]
            case "splice":
                data[at:] = SEEDS[what][int(where * len(SEEDS[what])) :]
    return bytes(data)


def check(answer):
    """Returns whether it is no error."""
    OUTCOMES["answered" if "error" not in answer else str(answer["status"])] += 1
    if "error" not in answer:
        assert answer["width"] * answer["height"] <= LIMITS["max_image_pixels"]
        return True
    assert set(answer) == {"error", "status"}
    assert answer["status"] in TOLD, answer
    said = answer["error"]
    assert re.fullmatch(r"[A-Z_a-z][^\n]{5,400}\.", said), said
    assert not re.search(r"Traceback|0x[0-9a-f]{6}|\w+Error|site-packages|/work|/usr|/tmp", said), said
    return False


@pytest.fixture(scope="module", autouse=True)
def record():
    """What came of them; nothing is logged, which pytest would keep."""
    logging.disable(logging.CRITICAL)
    start = time.monotonic()
    yield
    logging.disable(logging.NOTSET)
    if out := os.environ.get("FUZZ_OUT"):
        versions = installed(("hypothesis", "numpy", "pillow", "pydantic", "pyspng", "simplejpeg"))
        told = {"examples_of_a_kind": EXAMPLES, "outcomes": dict(OUTCOMES.most_common())}
        told |= {"grown_mb": max(GROWN, default=None), "seconds": round(time.monotonic() - start)}
        Path(out).write_text(json.dumps(told | provenance(versions), indent=1) + "\n", encoding="utf-8")


def ask(data, **fields):
    text = base64.b64encode(data).decode()
    return SERVICE.answer({"image_base64": text, "processing_res": SIDE, **fields}, "fuzz")


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_every_seed_is_an_image_that_is_read(number):
    assert check(ask(SEEDS[number]))


@many
@given(st.sampled_from(SEEDS), st.lists(mutation, min_size=1, max_size=6))
def test_a_mutated_image_is_read_or_refused_in_one_sentence(seed, mutations):
    check(ask(mutated(seed, mutations)))


@many
@given(st.binary(max_size=400), st.sampled_from([b"", *(seed[:16] for seed in SEEDS)]))
def test_bytes_that_begin_like_an_image_are_refused_in_one_sentence(data, magic):
    assert not check(ask(magic + data)) or len(data) > 20


scalar = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from(["", "0", "preview", "inferno", "da3-small", "original", "\x00", "\ud800", "true"]),
)
anything = st.recursive(
    scalar,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=12,
)
SAFE_FIELDS = sorted(FIELDS - {"image_url", "model_id"})
fields = st.dictionaries(
    st.one_of(st.sampled_from(SAFE_FIELDS), st.text(max_size=12)), anything, max_size=6
)


@many
@given(fields)
def test_a_request_of_anything_is_answered_or_refused_in_one_sentence(given_fields):
    image = base64.b64encode(SEEDS[4]).decode()
    check(SERVICE.answer({"image_base64": image, "processing_res": SIDE} | given_fields, "fuzz"))


@many
@given(anything)
def test_an_input_of_anything_is_refused_in_one_sentence(data):
    assert not check(SERVICE.answer(data, "fuzz"))


valid = st.fixed_dictionaries(
    {},
    optional={
        "outputs": st.lists(st.sampled_from(list(Output)), min_size=1, max_size=7),
        "output_size": st.sampled_from(["original", "model"]),
        "processing_res": st.integers(SIDE, 140),
        "clip_percentile_low": st.floats(0, 49),
        "clip_percentile_high": st.floats(50, 100),
        "gamma": st.floats(0.01, 10),
        "histogram_equalization": st.booleans(),
        "hist_clip_limit": st.floats(0, 256),
        "focal_length_px": st.floats(1, 1e6),
        "color_map": st.sampled_from(["turbo", "viridis"]),
    },
)


@many
@given(st.sampled_from(SEEDS), valid)
def test_every_valid_request_is_answered(seed, valid_fields):
    assert check(ask(seed, **valid_fields))


def test_memory_does_not_grow():
    """Drawn without Hypothesis, which remembers what it has drawn."""
    rng = np.random.default_rng(0)
    kinds = [
        ("flip", 3),
        ("write", WORDS[1]),
        ("insert", b"x" * 30),
        ("cut", 20),
        ("repeat", 40),
        ("end", None),
    ]

    def run(count):
        for number in range(count):
            drawn = [kinds[rng.integers(len(kinds))] for _ in range(rng.integers(1, 5))]
            mutations = [(kind, float(rng.random()), what) for kind, what in drawn]
            check(ask(mutated(SEEDS[number % len(SEEDS)], mutations)))

    run(5 * len(SEEDS))
    before = resident_mb()
    run(EXAMPLES)
    GROWN.append(round(resident_mb() - before, 1))
    assert GROWN[-1] < ROOM_MB
