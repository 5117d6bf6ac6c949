"""Mutated images and requests through the whole service: a result, or one sentence with the right status.

By default each test runs a few examples, always the same. ``make fuzz`` runs FUZZ new examples of each kind and
writes the outcomes to FUZZ_OUT.
"""

import gzip
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from benchmarks.record import installed, provenance
from benchmarks.serving import StandIn, prepared
from da3_runtime.api.request import FIELDS
from da3_runtime.output.encode import Output
from da3_runtime.serve.http_server import make_app
from da3_runtime.settings import Settings
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.util.extras import is_installed
from da3_runtime.variants import Head, find_variant
from tests.support.images import base64_text, encode, tiff_file
from tests.support.paths import INPUTS, NANO, ROOT
from tests.support.processes import resident_mb

SIDE = 84  # smallest side of a model input
LIMITS = {"max_image_bytes": 2**20, "max_image_pixels": 2**22}
EXAMPLES = int(os.environ.get("FUZZ") or 40)
LONG = EXAMPLES > 1000
# Allowed statuses of errors; 500 would be an unexpected exception.
ERROR_STATUSES = {400, 413, 415, 422}
ALLOWANCE_MB = 8  # memory that libraries may keep
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
    """A network that returns a constant depth map of its input's size."""

    def run(self, images, conditions=None):
        self.depth = np.ones(images.shape[2:4], np.float32)
        return super().run(images)


def service():
    variant = find_variant(NANO)
    network = Echo(np.ones((SIDE, SIDE), np.float32), 0, 0)
    folder = EngineFolder(variant, Head.DPT, Path("nowhere"), None)
    return prepared({variant.graphs[0].name: network}, folder, Settings.of(model_id=NANO, **LIMITS))


SERVICE = service()


def seeds():
    """Image files of every supported format and mode, some with EXIF or several frames."""
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
    deep = [
        tiff_file(rng.random((48, 48, 3), np.float32)),
        tiff_file(rng.integers(0, 1024, (48, 48, 2), np.uint16), ">", t338=2),
        cv2.imencode(".tiff", rng.integers(0, 65536, (48, 48, 3), np.uint16))[1].tobytes(),
        cv2.imencode(".png", rng.integers(0, 65536, (48, 48, 4), np.uint16))[1].tobytes(),
    ]
    if is_installed("pi_heif"):
        deep.append((INPUTS / "turned.heic").read_bytes())
    return [*(encode(image, fmt, **options) for image, fmt, options in made), *deep]


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


def check(response):
    """Check a result or an error; return whether it is a result."""
    OUTCOMES["answered" if "error" not in response else str(response["status"])] += 1
    if "error" not in response:
        assert response["width"] * response["height"] <= LIMITS["max_image_pixels"]
        return True
    assert set(response) == {"error", "status"}
    assert response["status"] in ERROR_STATUSES, response
    message = response["error"]
    assert re.fullmatch(r"[A-Z_a-z][^\n]{5,400}\.", message), message
    internal = rf"Traceback|0x[0-9a-f]{{6}}|\w+Error|site-packages|/usr|/tmp|{ROOT}"
    assert not re.search(internal, message), message
    return False


@pytest.fixture(scope="module", autouse=True)
def record():
    """Write the outcomes to FUZZ_OUT; logging is off, because pytest would keep every log line in memory."""
    logging.disable(logging.CRITICAL)
    start = time.monotonic()
    yield
    logging.disable(logging.NOTSET)
    if out := os.environ.get("FUZZ_OUT"):
        versions = installed(("hypothesis", "numpy", "pillow", "pydantic", "pyspng", "simplejpeg"))
        result = {"examples_of_a_kind": EXAMPLES, "outcomes": dict(OUTCOMES.most_common())}
        result |= {"grown_mb": max(GROWN, default=None), "seconds": round(time.monotonic() - start)}
        Path(out).write_text(
            json.dumps(result | provenance(versions), indent=1) + "\n", encoding="utf-8"
        )


def ask(data, **fields):
    return SERVICE.answer({"image_base64": base64_text(data), "processing_res": SIDE, **fields}, "fuzz")


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_every_unmodified_image_is_read(number):
    assert check(ask(SEEDS[number]))


@many
@given(st.sampled_from(SEEDS), st.lists(mutation, min_size=1, max_size=6))
def test_a_mutated_image_gives_a_result_or_one_error_sentence(seed, mutations):
    check(ask(mutated(seed, mutations)))


@many
@given(st.binary(max_size=400), st.sampled_from([b"", *(seed[:16] for seed in SEEDS)]))
def test_random_bytes_after_an_image_s_signature_give_one_error_sentence(data, magic):
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
def test_random_fields_give_a_result_or_one_error_sentence(given_fields):
    image = base64_text(SEEDS[4])
    check(SERVICE.answer({"image_base64": image, "processing_res": SIDE} | given_fields, "fuzz"))


@many
@given(anything)
def test_a_random_input_gives_one_error_sentence(data):
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
def test_every_valid_request_gives_a_result(seed, valid_fields):
    assert check(ask(seed, **valid_fields))


@pytest.fixture(scope="module")
def client():
    with TestClient(make_app(SERVICE, threading.Thread())) as client:
        yield client


CONTENT_TYPES = [
    "image/png",
    "application/octet-stream",
    "application/json",
    "multipart/form-data",
    "a",
    "",
]
some_query = st.dictionaries(
    st.sampled_from([*SAFE_FIELDS, "model_id"]), st.text(max_size=12), max_size=2
)


def body_of(kind, image):
    """A valid body of that kind, and its content type."""
    match kind:
        case "image":
            return image, "image/png"
        case "form":
            form = httpx.Request(
                "POST", "http://x", files={"image": image}, data={"processing_res": "84"}
            )
            return form.read(), form.headers["content-type"]
    return json.dumps({"input": {"image_base64": base64_text(image)}}).encode(), "application/json"


@many
@given(
    st.sampled_from(["image", "form", "job"]),
    st.sampled_from(SEEDS),
    st.lists(mutation, max_size=3),
    st.lists(mutation, max_size=3),
    st.sampled_from([None, None, "gzip", "identity", "br"]),
    st.one_of(st.none(), st.none(), st.sampled_from(CONTENT_TYPES)),
    some_query,
)
def test_a_mutated_body_gives_a_result_or_one_error_sentence(
    client, kind, seed, of_image, of_body, encoding, content_type, query
):
    body, right_type = body_of(kind, mutated(seed, of_image))
    if encoding == "gzip":
        body = gzip.compress(body, 1)
    headers = {"content-type": right_type if content_type is None else content_type}
    if encoding is not None:
        headers["content-encoding"] = encoding
    response = client.post(
        "/runsync",
        params={"processing_res": SIDE} | query,
        content=mutated(body, of_body),
        headers=headers,
    )
    answer = response.json()
    if "output" in answer:  # RunPod's envelope of a job
        answer = answer["output"] | {name: answer[name] for name in ("error",) if name in answer}
    check(answer)
    assert response.status_code == answer.get("status", 200)


def test_memory_does_not_grow():
    """Mutates with NumPy's generator, because Hypothesis keeps its examples in memory."""
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
            chosen = [kinds[rng.integers(len(kinds))] for _ in range(rng.integers(1, 5))]
            mutations = [(kind, float(rng.random()), what) for kind, what in chosen]
            check(ask(mutated(SEEDS[number % len(SEEDS)], mutations)))

    run(5 * len(SEEDS))
    before = resident_mb()
    run(EXAMPLES)
    GROWN.append(round(resident_mb() - before, 1))
    assert GROWN[-1] < ALLOWANCE_MB
