"""``make bench-cold-start``: measures the seconds from the start of a process to its first result.

Three starts are compared: an engine in the environment of the image target ``lean``, bytecode included;
this project's PyTorch eager in the current environment, also from bytecode; and the reference service
with all of upstream's package (:mod:`benchmarks.upstream_start`). The first two start as serving does:
the model loads while the RunPod SDK is imported. The clock starts before the process.

A fourth start loads no model: how much later a worker with one is ready is what the model adds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.images import compile_environment, copy_application, make_environment, site_of
from benchmarks.record import RESULTS, ROOT, installed, provenance, write_result
from da3_runtime.store.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from da3_runtime.store.engine_weights import engine_checkpoint
from da3_runtime.store.find_engine import local_engine
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import find_variant

STEPS = ("interpreter", "import", "sdk_import", "engine_load", "ready", "first_inference", "total")
NO_MODEL = "no model"
ENGINE = "onnxruntime-cpu"
# Its first response takes seconds on a CPU, so only its engine is started, for what it adds.
LARGE = "da3-large"
PHOTO = ROOT / "examples" / "temple.jpg"
# Code of the worker process: prints the seconds of each step as JSON. BEGAN is the time of its start.
# If NO_MODEL is set, it loads none, and its value stands for the backend.
WORKER = """
import os, sys, time
seen = {"interpreter": time.time() - float(os.environ["BEGAN"])}
clock = time.perf_counter
start = clock()
import base64, json, threading
from pathlib import Path
from da3_runtime.util.garbage import no_garbage_collection
with no_garbage_collection(freeze=True):
    from da3_runtime.util.runpod_sdk import import_sdk
    from da3_runtime.serve.service import Service
    from da3_runtime.settings import Settings
    import da3_runtime.serve.runpod_worker
seen["import"] = clock() - start
service = Service(Settings.from_env())
has_model = "NO_MODEL" not in os.environ
def load():
    start = clock()
    if has_model:
        service.load_default()
    seen["engine_load"] = clock() - start
thread = threading.Thread(target=load)
thread.start()
start = clock()
with no_garbage_collection():
    import_sdk()
seen["sdk_import"] = clock() - start
thread.join()
seen["ready"] = time.time() - float(os.environ["BEGAN"])
start = clock()
answer = {"backend": os.environ.get("NO_MODEL")}
if has_model:
    image = base64.b64encode(Path(os.environ["PHOTO"]).read_bytes()).decode()
    answer = service.answer({"image_base64": image}, "first")
seen["first_inference"] = clock() - start
seen["total"] = time.time() - float(os.environ["BEGAN"])
print(json.dumps({"seconds": seen, "backend": answer.get("backend"), "error": answer.get("error")}))
"""


class Start(NamedTuple):
    """Command, working directory and environment variables of a worker process."""

    line: list[str]
    folder: Path
    env: dict[str, str]


def run_once(backend: str, start: Start) -> dict[str, float]:
    """Seconds of each step of one start."""
    line, folder, env = start
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | env
    env |= {"BEGAN": repr(time.time()), "PHOTO": str(PHOTO)}
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    result = json.loads(done.stdout.splitlines()[-1])
    if result["error"] or result["backend"] != backend:
        raise RuntimeError(f"{result['error'] or result['backend']}")
    return {step: float(result["seconds"][step]) for step in STEPS}


def make_reference(folder: Path) -> str:
    """Create an environment with the reference service's packages; return the path of its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    beside = (sysconfig.get_path("purelib"), ROOT / "runtime", ROOT / "export")
    (site_of(folder) / "beside.pth").write_text(
        "".join(f"{each}\n" for each in beside), encoding="utf-8"
    )
    line = [sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check"]
    line += ["install", "--require-hashes", "--no-deps", "-r", "requirements/reference.txt"]
    subprocess.run(line, cwd=ROOT, check=True)
    return python


def hub_folder(folder: Path, settings: EngineSettings) -> Path:
    """Create a folder in the hub's layout with the weights that the model's engine was built from."""
    folder.mkdir()
    weights = engine_checkpoint(local_engine(settings), settings).path
    (folder / WEIGHTS_FILE).symlink_to(weights.resolve())
    (folder / CONFIG_FILE).write_text(json.dumps({"model_name": settings.model_id}), encoding="utf-8")
    return folder


def main(argv: list[str] | None = None) -> int:
    """Measure the starts in turn, print the medians and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__)
    parser.add_argument(
        "--engine-dir", type=Path, default=Path(os.environ.get("ENGINE_DIR") or "engines")
    )
    parser.add_argument(
        "--models",
        default=f"da3-nano,da3-small,{LARGE}",
        help="model ids; models without an engine are skipped",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "cold_start.json")
    args = parser.parse_args(argv)
    engine_dir = args.engine_dir.resolve()
    models = [
        name for name in args.models.split(",") if (engine_dir / name / "dpt/manifest.json").exists()
    ]
    if not models:
        parser.error("no engine found; build one with: make engines MODEL=da3-nano")
    rows = []
    added = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_environment(folder / "lean")
        copy_application(folder / "app")
        compile_environment(folder / "lean", folder / "app", folder / "bytecode")
        lean = str(folder / "lean" / "bin" / "python")
        reference = make_reference(folder / "reference")
        for model in models:
            env = {"MODEL_ID": model, "ENGINE_DIR": str(engine_dir), "HF_HUB_OFFLINE": "1"}
            bytecode = {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
            worker = Start([lean, "-c", WORKER], folder / "app", env | {"BACKEND": ENGINE} | bytecode)
            starts = {NO_MODEL: worker._replace(env=worker.env | {"NO_MODEL": NO_MODEL}), ENGINE: worker}
            if model != LARGE:
                line = [sys.executable, "-c", WORKER]
                starts["eager"] = Start(line, ROOT, env | {"BACKEND": "eager"})
                if find_variant(model).repo is not None:
                    settings = EngineSettings(model_id=model, engine_dir=engine_dir)
                    weights = hub_folder(folder / model, settings)
                    line = [reference, "-m", "benchmarks.upstream_start", str(weights), str(PHOTO)]
                    starts["upstream"] = Start(line, ROOT, {"HF_HUB_OFFLINE": "1"})
            rounds: dict[str, list[dict[str, float]]] = {backend: [] for backend in starts}
            for number in range(args.rounds + 1):
                for backend, start in starts.items():
                    seconds = run_once(backend, start)
                    # The first start is not counted: it fills the system's file cache.
                    if number:
                        rounds[backend].append(seconds)
            adds = [
                each["ready"] - empty["ready"]
                for each, empty in zip(rounds[ENGINE], rounds[NO_MODEL], strict=True)
            ]
            added[model] = round(median(adds), 3)
            print(f"{model:10s} adds {added[model]:.2f} s until the worker is ready", flush=True)
            for backend, runs in rounds.items():
                medians = {step: round(median(run[step] for run in runs), 3) for step in STEPS}
                rows.append({"model": model, "backend": backend, "median_s": medians, "runs": runs})
                line_text = "  ".join(f"{step} {seconds:.2f}" for step, seconds in medians.items())
                print(f"{model:10s} {backend:16s} {line_text}", flush=True)
    packages = ("numpy", "onnxruntime", "opencv-python-headless", "runpod", "torch")
    result = {"rounds": args.rounds, "load_average": os.getloadavg()[0], "added_s": added, "rows": rows}
    result |= provenance({"python": sys.version.split()[0], **installed(packages)})
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
