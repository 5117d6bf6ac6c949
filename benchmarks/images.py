"""``make image-sizes``: the size of the serving images, package by package, without a Docker engine.

The lists of Dockerfile.runtime are installed into an empty environment, stripped and compiled as it
does, and added up. PyTorch's CUDA build, gigabytes, is installed with ``--full`` only; without it the
figures of ``full`` and of the reference service stay those of the result file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

from benchmarks.record import RESULTS, ROOT, provenance, write_result

# Dockerfile.runtime's build argument: the library whose plans the image runs, the default first.
PLANS = ("tensorrt-rtx", "tensorrt-lean")
MB = 1e6
# Smaller packages are printed as one line, 10^6 bytes.
SHOWN = 10.0
# "Virtual Size" of the base, all layers on disk.
BASE_MB = 124.35
BASE_SOURCE = "docker-library/repo-info, repos/python/local/3.12.14-slim-bookworm.md (amd64, 2026-08-13)"
# Kept from the result file if they are not measured again.
KEPT = ("full", "reference")
WHY = {
    "tensorrt-rtx-cu12-libs": "runs plans and builds them: one library, not to be split",
    "tensorrt-lean-cu12-libs": "runs TensorRT's version-compatible plans",
    "opencv-python-headless": "resizes as upstream does; links ffmpeg and OpenBLAS, used or not",
    "numpy": "arrays; half of it OpenBLAS",
    "onnxruntime": "answers without a GPU; its second copy, for programs in C, is left out",
    "pillow": "reads images; a third of it AVIF",
    "cuda-bindings": "device memory, streams, graphs; 85 MB of its sources are left out",
    "torch": "eager",
    "triton": "declared by torch",
}


def site_of(environment: Path) -> Path:
    """The folder of an environment's packages."""
    (site,) = (environment / "lib").glob("python3*/site-packages")
    return site


def make_environment(
    folder: Path, python: str = sys.executable, lists: Sequence[str] = (f"lean-{PLANS[0]}",)
) -> Path:
    """Install locked lists into an empty environment and strip it as Dockerfile.runtime does.

    Returns
    -------
    Path
        The folder of its packages.
    """
    empty_environment(folder, python)
    return install(folder, [ROOT / "requirements" / f"{name}.txt" for name in lists])


def empty_environment(folder: Path, python: str = sys.executable) -> None:
    """Make an environment without packages, pip included."""
    subprocess.run([python, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)


def install(folder: Path, lists: Iterable[Path]) -> Path:
    """Install locked lists into an environment and strip all its packages; returns their folder."""
    line = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--quiet"]
    line += ["--disable-pip-version-check", "install", "--require-hashes", "--no-deps", "--no-compile"]
    subprocess.run([*line, *(f"-r{path}" for path in lists)], cwd=ROOT, check=True)
    site = site_of(folder)
    subprocess.run([sys.executable, str(ROOT / "scripts" / "slim.py"), "strip", str(site)], check=True)
    return site


def copy_application(folder: Path, bundled: bool = False) -> None:
    """Copy the package to ``folder`` as target ``lean`` has it, or ``full``, with ``bundled``."""
    left_out = ["__pycache__"] if bundled else ["__pycache__", "bundled"]
    shutil.copytree(
        ROOT / "runtime" / "da3_runtime",
        folder / "da3_runtime",
        ignore=shutil.ignore_patterns(*left_out),
    )


def compile_environment(folder: Path, application: Path, bytecode: Path) -> None:
    """Write the bytecode that target ``lean`` has to a folder of its own; this Python is not changed."""
    line = [str(folder / "bin" / "python"), str(ROOT / "scripts" / "slim.py"), "compile"]
    env = os.environ | {"PYTHONPATH": str(application), "PYTHONPYCACHEPREFIX": str(bytecode)}
    subprocess.run(line, env=env, check=True)


def size_of(folder: Path) -> float:
    """Size of the files below a folder, 10^6 bytes."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / MB


def package_sizes(site: Path) -> dict[str, float]:
    """Size of the files of each package that are still in a folder of packages, 10^6 bytes."""
    sizes: dict[str, float] = {}
    for each in distributions(path=[str(site)]):
        paths = [Path(str(file.locate())) for file in each.files or []]
        name = canonicalize_name(each.metadata["Name"])
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file()) / MB
    return sizes


def pins(*lists: str) -> dict[str, str]:
    """Versions that locked lists pin."""
    texts = [(ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8") for name in lists]
    return dict(re.findall(r"^([\w.-]+)==([^ ;]+)", "\n".join(texts), re.MULTILINE))


def find_python() -> str:
    """The image's Python, 3.12, if it is installed; else this one."""
    for name in filter(None, (os.environ.get("IMAGE_PYTHON"), "python3.12")):
        line = [name, "-c", "import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))"]
        if shutil.which(name) and subprocess.run(line, capture_output=True, check=False).returncode == 0:
            return name
    return sys.executable


def measure_lean(python: str, plans: str) -> tuple[dict[str, float], dict[str, float]]:
    """Size of target ``lean`` by part, and of each of its packages."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = make_environment(folder / "lean", python, [f"lean-{plans}"])
        copy_application(folder / "app")
        compile_environment(folder / "lean", folder / "app", folder / "bytecode")
        parts = {
            "base": BASE_MB,
            "packages": size_of(site),
            "bytecode": size_of(folder / "bytecode"),
            "application": size_of(folder / "app"),
        }
        return parts, package_sizes(site)


def measure_full(python: str) -> tuple[dict[str, float], dict[str, float]]:
    """Size of what ``full`` adds to ``lean`` by part, without bytecode, and of each of its packages."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = make_environment(folder / "eager", python, ["full"])
        copy_application(folder / "with", bundled=True)
        copy_application(folder / "without")
        checkpoints = size_of(folder / "with") - size_of(folder / "without")
        return {"packages": size_of(site), "application": checkpoints}, package_sizes(site)


def print_packages(title: str, sizes: dict[str, float]) -> None:
    """Print large packages, largest first, and the sum of the rest."""
    large = sorted((name for name in sizes if sizes[name] >= SHOWN), key=lambda name: -sizes[name])
    rest = [size for size in sizes.values() if size < SHOWN]
    print(title)
    for name in large:
        print(f"  {sizes[name]:8.1f}  {name:28s} {WHY.get(name, '')}")
    print(f"  {sum(rest):8.1f}  {len(rest)} smaller ones")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="install and measure PyTorch's CUDA build too"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "images.json")
    args = parser.parse_args(argv)
    python = find_python()
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    lean: dict[str, dict[str, float | dict[str, float]]] = {}
    totals = {}
    for plans in PLANS:
        parts, packages = measure_lean(python, plans)
        totals[plans] = sum(parts.values())
        lean[plans] = {"total": totals[plans], "parts": parts, "packages": packages}
        print_packages(f"lean, PLANS={plans}: {totals[plans]:.0f} MB", packages)
        for part, size in parts.items():
            print(f"  {size:8.1f}  {part}")
    result = {
        "unit": "10^6 bytes, unpacked, without engines",
        "lean": lean,
        **{name: before[name] for name in KEPT if name in before},
        "base_source": BASE_SOURCE,
    }
    if args.full:
        parts, packages = measure_full(python)
        total = totals[PLANS[0]] + sum(parts.values())
        result["full"] = {
            "total": total,
            "packages": packages,
            "application": parts["application"],
            "not_counted": ["bytecode of eager"],
            "how": "installed and stripped",
        }
        print_packages(f"full, PLANS={PLANS[0]}: {total:.0f} MB, lean included; beyond it", packages)
    version = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.strip()
    versions = {"python": version, **pins(*(f"lean-{plans}" for plans in PLANS))}
    write_result(args.out, result | provenance(versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
