"""``make bench-serving``: the time of a request outside the model, and throughput of several clients.

First, whole requests, from Base64 to response, in turn with the reference service's steps
(:mod:`benchmarks.pillow_pipeline`), on photos of several sizes. A stand-in network returns da3-nano's
depth of the photo at once. Second, requests per second of 1 to 16 clients: with a stand-in that
takes a fixed time per batch and per image, as a GPU does, and with da3-nano's engine.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import pillow_pipeline
from benchmarks.record import RESULTS, ROOT, installed, provenance, write_result
from benchmarks.rounds import summarize, time_in_turn
from da3_export.util.progress import aligned
from da3_runtime.backends.base import Backend
from da3_runtime.image.preprocess import model_input
from da3_runtime.inference.estimator import Estimator
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.inference.model_pool import ModelKey
from da3_runtime.network_io import Conditions, RawOutputs
from da3_runtime.serve.service import Service
from da3_runtime.settings import Settings
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import Graph

PHOTO = ROOT / "examples" / "temple.jpg"
SIZES = ((640, 480), (1920, 1080), (4032, 3024), (4096, 4096))
FORMATS = ("JPEG", "PNG")
CLIENTS = (1, 2, 4, 8, 16)
# Seconds that the stand-in for a GPU takes per batch and per image.
PER_BATCH, PER_IMAGE = 0.020, 0.002
SECONDS = 3.0  # duration of a throughput measurement
MS = 1e3


class StandIn(Backend):
    """Returns one depth map for every image, after a fixed time per batch and per image."""

    name = "stand-in"
    precision = "fp32"
    trained = True
    gains_from_batches = True

    def __init__(self, depth: NDArray[np.float32], per_batch: float, per_image: float) -> None:
        self.depth = depth
        self.per_batch, self.per_image = per_batch, per_image

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        raise NotImplementedError

    def run(self, images: NDArray[np.uint8], conditions: Conditions | None = None) -> RawOutputs:
        time.sleep(self.per_batch + self.per_image * len(images))
        maps = np.repeat(self.depth[None, None], len(images), axis=0)
        lens = np.repeat(np.eye(3, dtype=np.float32)[None, None], len(images), axis=0)
        return RawOutputs(maps, maps, None, lens, lens[..., (0, 1, 2, 2)])


class Sample(NamedTuple):
    """One image as a request carries it, and its depth.

    Attributes
    ----------
    name : str
        Size and format.
    width, height : int
        Pixels.
    text : str
        Base64.
    depth : NDArray[np.float32]
        [h, w], at the model's size.
    """

    name: str
    width: int
    height: int
    text: str
    depth: NDArray[np.float32]


def photo(width: int, height: int) -> Image.Image:
    """The bundled photo resized to a size, with the noise of a camera's sensor."""
    pixels = np.asarray(
        Image.open(PHOTO).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    )
    noise = np.random.default_rng(0).normal(0, 2, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def samples(estimator: Estimator, sizes: tuple[tuple[int, int], ...]) -> list[Sample]:
    """The photo in every size and format."""
    found = []
    for width, height in sizes:
        image = photo(width, height)
        (raw,) = estimator.loaded.run(model_input(np.asarray(image), 504)).values()
        for fmt in FORMATS:
            stream = io.BytesIO()
            image.save(stream, fmt, **({"quality": 90} if fmt == "JPEG" else {}))
            text = base64.b64encode(stream.getvalue()).decode()
            found.append(Sample(f"{width} x {height} {fmt}", width, height, text, raw.depth[0, 0]))
    return found


class Prepared(Service):
    """A service whose every model has the same networks, which are loaded already."""

    def __init__(self, graphs: dict[str, Backend], folder: EngineFolder, settings: Settings) -> None:
        super().__init__(settings)
        self._graphs, self._folder = graphs, folder

    def _load(self, key: ModelKey) -> Estimator:
        # A new one each time: the pool closes the last one for a request with another head.
        loaded = Loaded(self._folder, self._graphs, [])
        return Estimator(loaded, self.settings.images, self.settings.inference)


def prepared(graphs: dict[str, Backend], folder: EngineFolder, settings: Settings) -> Service:
    """A service that runs these networks."""
    service = Prepared(graphs, folder, settings)
    service.load_default()
    return service


def reference_request(sample: Sample) -> str:
    """The reference service's steps without the model; returns the preview in Base64."""
    rgb = pillow_pipeline.decode(sample.text)
    model_input(rgb, 504)
    gray = pillow_pipeline.preview(sample.depth, rgb.shape[1], rgb.shape[0])
    return pillow_pipeline.answer(gray)


def ask(service: Service, text: str, **fields: object) -> dict[str, Any]:
    """The service's response; raises RuntimeError if it is an error."""
    answer: dict[str, Any] = service.answer({"image_base64": text, **fields}, "bench")
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def compare(ours: str, theirs: str) -> dict[str, float]:
    """Share of pixels within one gray level, and the largest difference, of two PNGs in Base64."""
    one, other = (np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in (ours, theirs))
    apart = np.abs(one.astype(int) - other)
    return {"within_1": float((apart <= 1).mean()), "most": int(apart.max())}


def overhead(
    sample: Sample, folder: EngineFolder, settings: Settings, rounds: int, per_round: int
) -> dict[str, Any]:
    """Times of one sample, of our service and of the reference's steps in turn."""
    (graph,) = folder.variant.graphs
    service = prepared({graph.name: StandIn(sample.depth, 0, 0)}, folder, settings)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ask(service, sample.text, processing_res=504),
        "reference": lambda: reference_request(sample),
    }
    difference = compare(
        str(ask(service, sample.text, processing_res=504)["image_base64"]), reference_request(sample)
    )
    seconds, failures = time_in_turn(runs, rounds, per_round)
    if failures:
        raise RuntimeError(str(failures))
    timings = {name: summarize(turns) for name, turns in seconds.items()}
    by_round = [
        r.median_ms / o.median_ms
        for r, o in zip(timings["reference"].rounds, timings["ours"].rounds, strict=True)
    ]
    stages = ask(service, sample.text, processing_res=504)["timings_ms"]
    return {
        "sample": sample.name,
        "ours_ms": timings["ours"].median_ms,
        "reference_ms": timings["reference"].median_ms,
        "times_less": median(by_round),
        "stages_ms": stages,
        "picture": difference,
    }


def throughput(service: Service, text: str, clients: int, seconds: float) -> float:
    """Requests per second of clients that send the next request as soon as they get a response."""
    until = time.perf_counter() + seconds

    def work(_: int) -> int:
        count = 0
        while time.perf_counter() < until:
            ask(service, text)
            count += 1
        return count

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        total = sum(threads.map(work, range(clients)))
    return total / (time.perf_counter() - start)


def sharing(
    folder: EngineFolder, real: Estimator, sample: Sample, settings: Settings, rounds: int
) -> list[dict[str, Any]]:
    """Requests per second by number of clients, with and without batches.

    Each round measures every number of clients once; the rows have the medians.
    """
    (graph,) = folder.variant.graphs
    gpu: dict[str, Backend] = {graph.name: StandIn(sample.depth, PER_BATCH, PER_IMAGE)}
    rows = []
    for name, graphs in (("stand-in", gpu), (real.loaded.backend.name, real.loaded.graphs)):
        for max_batch in (1, None):
            if max_batch is None and name != "stand-in":
                continue
            service = prepared(graphs, folder, settings.changed(max_batch=max_batch))
            rates: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
            for _ in range(rounds):
                for clients in CLIENTS:
                    rates[clients].append(throughput(service, sample.text, clients, SECONDS))
            rows += [
                {
                    "network": name,
                    "max_batch": max_batch or 8,
                    "clients": clients,
                    "per_second": median(by_round),
                    "by_round": by_round,
                }
                for clients, by_round in rates.items()
            ]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-round", type=int, default=2)
    parser.add_argument("--largest", type=int, default=4096, help="skip wider photos")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    args = parser.parse_args(argv)
    # The photos are large on purpose.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    settings = Settings.from_env({"MODEL": "da3-nano", **os.environ})
    real = Estimator.load(settings.engine)
    folder = real.loaded.folder
    sizes = tuple(size for size in SIZES if size[0] <= args.largest)
    found = samples(real, sizes)
    rows = []
    for sample in found:
        rows.append(overhead(sample, folder, settings, args.rounds, args.per_round))
        print(".", end="", file=sys.stderr, flush=True)
    lines = [
        ("request", "ours ms", "reference ms", "times less", "within 1 level", "largest difference")
    ]
    lines += [
        (
            row["sample"],
            f"{row['ours_ms']:.0f}",
            f"{row['reference_ms']:.0f}",
            f"{row['times_less']:.1f}",
            f"{row['picture']['within_1']:.2%}",
            f"{row['picture']['most']:.0f}",
        )
        for row in rows
    ]
    print("\n" + aligned(lines), flush=True)
    shared = sharing(folder, real, found[0], settings, args.rounds)
    rates = [("network", "largest batch", "clients", "requests per second")]
    rates += [
        (row["network"], str(row["max_batch"]), str(row["clients"]), f"{row['per_second']:.1f}")
        for row in shared
    ]
    print("\n" + aligned(rates))
    packages = ("numpy", "pillow", "opencv-python-headless", "isal", "simplejpeg", "onnxruntime")
    result = {
        "rounds": args.rounds,
        "load_average": os.getloadavg()[0],
        "requests": rows,
        "sharing": shared,
    }
    result |= {"stand_in_s": {"batch": PER_BATCH, "image": PER_IMAGE}}
    result |= provenance({"python": sys.version.split()[0], **installed(packages)})
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
