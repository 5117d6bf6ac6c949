"""``make image-sizes``: what the serving images weigh, package by package, without a Docker engine.

The lists of Dockerfile.runtime are installed into an empty environment, stripped and compiled as it
does, and added up. The CUDA build of PyTorch, gigabytes, is not downloaded: its wheels' own tables of
contents, of which the package index sends just that part, say what they unpack to. What cannot be
measured here is quoted with its source.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email import message_from_bytes
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from benchmarks.record import RESULTS, ROOT, provenance, write_result

DOCKERFILE = ROOT / "Dockerfile.runtime"
# Dockerfile.runtime's build argument: whose plans the image runs, the default first.
PLANS = ("tensorrt-rtx", "tensorrt-lean")
PYTHON = (3, 12)
MB = 1e6
# What is shown on a line of its own, 10^6 bytes.
SHOWN = 10.0
# The end of a wheel that is fetched at once: its table of contents and its metadata.
TAIL_BYTES = 4 * 2**20
# "Virtual Size", of all layers on disk, of our base.
BASE_MB = 124.35
BASE_SOURCE = "docker-library/repo-info, repos/python/local/3.12.14-slim-bookworm.md (amd64, 2026-08-13)"
# What the reference service's bootstrap.sh installs, beside more, at a worker's first start.
REFERENCE = ("torch", "2.9.1")
# Its image is this and a compiler. What a registry sends of it, compressed; the unpacked size, which is
# larger, is not published.
REFERENCE_BASE = "nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04"
REFERENCE_BASE_MB = 5593 * 2**20 / MB
REFERENCE_BASE_SOURCE = "runpod/containers, pull request 144 (amd64, 2026-07-11)"
WHY = {
    "tensorrt-rtx-cu12-libs": "runs plans and builds them: one library, not to be split",
    "tensorrt-lean-cu12-libs": "runs TensorRT's version-compatible plans",
    "opencv-python-headless": "resizes as upstream does; links ffmpeg and OpenBLAS whether used or not",
    "numpy": "arrays; half of it OpenBLAS",
    "onnxruntime": "answers without a GPU; its second copy, for programs in C, is left out",
    "pillow": "reads images; a third of it AVIF",
    "cuda-bindings": "device memory, streams, graphs; 85 MB of its sources are left out",
    "torch": "eager",
    "triton": "asked for by torch",
}


@dataclass(frozen=True)
class Stage:
    """One stage of a Dockerfile.

    Attributes
    ----------
    base : str
        What its FROM names.
    instructions : list[tuple[str, str]]
        Keyword and the rest, continued lines joined.
    """

    base: str
    instructions: list[tuple[str, str]]

    def of(self, keyword: str) -> list[str]:
        """What follows a keyword, in order."""
        return [rest for name, rest in self.instructions if name == keyword]

    @property
    def sources(self) -> list[str]:
        """What it copies and mounts from the build's context."""
        copies = [rest.split() for rest in self.of("COPY")]
        found = [word for words in copies if "--from" not in words[0] for word in words[:-1]]
        return found + re.findall(r"type=bind,source=([^, ]+)", "\n".join(self.of("RUN")))

    def requirements(self, plans: str = PLANS[0]) -> list[str]:
        """The lists that it installs, for a value of ``PLANS``."""
        commands = "\n".join(self.of("RUN")).replace("${PLANS}", plans)
        return re.findall(r'-r "?([^\s"]+)', commands)


def stages(dockerfile: Path) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, in order."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(None, lines):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            base, _, name = rest.split()
            current = found[name] = Stage(base, [])
        elif current is not None:
            current.instructions.append((keyword, re.sub(r"\s+", " ", rest)))
    return found


def site_of(environment: Path) -> Path:
    """Where an environment's packages are."""
    (site,) = (environment / "lib").glob("python3*/site-packages")
    return site


def make_environment(folder: Path, python: str = sys.executable, plans: str = PLANS[0]) -> Path:
    """An environment with what target ``lean`` installs, stripped alike; where its packages are."""
    subprocess.run([python, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
    lists = stages(DOCKERFILE)["packages"].requirements(plans)
    line = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--quiet"]
    line += ["--disable-pip-version-check", "install", "--require-hashes", "--no-deps", "--no-compile"]
    subprocess.run([*line, *(f"-r{name}" for name in lists)], cwd=ROOT, check=True)
    site = site_of(folder)
    subprocess.run([sys.executable, str(ROOT / "scripts" / "slim.py"), "strip", str(site)], check=True)
    return site


def copy_application(folder: Path, target: str = "lean") -> None:
    """Copy to ``folder`` what a target copies from the checkout to its working directory."""
    for copied in stages(DOCKERFILE)[target].of("COPY"):
        *sources, place = copied.split()
        if sources[0].startswith("--from"):
            continue
        for pattern in sources:
            for source in sorted(ROOT.glob(pattern)):
                if source.is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(source, folder / place, ignore=ignored, dirs_exist_ok=True)
                else:
                    (folder / place).mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, folder / place)


def compile_environment(folder: Path, application: Path, bytecode: Path, *more: str) -> None:
    """Write the bytecode that the image has, to a folder of its own: this Python is not changed."""
    line = [str(folder / "bin" / "python"), str(ROOT / "scripts" / "slim.py"), "compile", *more]
    env = os.environ | {"PYTHONPATH": str(application), "PYTHONPYCACHEPREFIX": str(bytecode)}
    subprocess.run(line, env=env, check=True)


def size_of(folder: Path) -> float:
    """What the files below a folder weigh, 10^6 bytes."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / MB


def package_sizes(site: Path) -> dict[str, float]:
    """What is left of each package in a folder of packages, 10^6 bytes."""
    return {_name(each): _left(each) for each in distributions(path=[str(site)])}


def _name(distribution: Distribution) -> str:
    return canonicalize_name(distribution.metadata["Name"])


def _left(distribution: Distribution) -> float:
    paths = [Path(str(file.locate())) for file in distribution.files or []]
    return sum(path.stat().st_size for path in paths if path.is_file()) / MB


class RemoteFile(io.RawIOBase):
    """A file on a web server of which the end is fetched at once, and the rest where it is read.

    Parameters
    ----------
    url : str
        Where it is.
    size : int
        Its bytes.
    """

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._size = size
        self._at = 0
        self._tail_at = max(0, size - TAIL_BYTES)
        self._tail = self._fetch(self._tail_at, size)

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move there."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read as much as there is room for."""
        end = min(self._at + len(buffer), self._size)
        if self._at >= self._tail_at:
            data = self._tail[self._at - self._tail_at : end - self._tail_at]
        else:
            data = self._fetch(self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _fetch(self, start: int, end: int) -> bytes:
        part = {"Range": f"bytes={start}-{end - 1}"}
        with urllib.request.urlopen(urllib.request.Request(self._url, headers=part)) as answer:
            if answer.status != 206:
                raise OSError("the package index sends no parts of files")
            return bytes(answer.read())


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index.

    Attributes
    ----------
    packed, unpacked : float
        Its size and, as its table of contents says, what it unpacks to, 10^6 bytes.
    pins : dict[str, str]
        Versions of the packages that it asks for in just one.
    """

    packed: float
    unpacked: float
    pins: dict[str, str]


def read_wheel(url: str, size: int) -> Wheel:
    """Read a wheel's table of contents where it lies."""
    with zipfile.ZipFile(io.BufferedReader(RemoteFile(url, size), 2**18)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist()) / MB
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+dist-info/METADATA", name))
        asked = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return Wheel(size / MB, unpacked, dict(_pinned(asked)))


def _pinned(asked: list[str]) -> Iterator[tuple[str, str]]:
    """Of requirements on Linux those that name one version."""
    linux = {"extra": "", "platform_system": "Linux", "platform_machine": "x86_64"}
    for requirement in map(Requirement, asked):
        exact = re.fullmatch(r"==([^*,]+)", str(requirement.specifier))
        if exact and (requirement.marker is None or requirement.marker.evaluate(linux)):
            yield canonicalize_name(requirement.name), exact[1]


def _index() -> str:
    """The package index that pip is configured with."""
    line = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    told = subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()
    if url := os.environ.get("PIP_INDEX_URL") or told:
        return url
    from pip._internal.models.index import PyPI

    return str(PyPI.simple_url)


def _platforms() -> list[str]:
    """What a wheel's file may say it is for, the newest first: Debian 12 has glibc 2.36."""
    return [
        *(f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)),
        "manylinux2014_x86_64",
        "linux_x86_64",
    ]


def find_wheel(name: str, version: str) -> Wheel | None:
    """The wheel that pip would take for the image; None if there is only a source package."""
    page = f"{_index().rstrip('/')}/{canonicalize_name(name)}/"
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    with urllib.request.urlopen(urllib.request.Request(page, headers=accept)) as answer:
        files = json.load(answer)["files"]
    fits = set(cpython_tags(PYTHON, platforms=_platforms()))
    fits |= set(compatible_tags(PYTHON, "cp312", _platforms()))
    for file in files:
        if not file["filename"].endswith(".whl"):
            continue
        _, found, _, tags = parse_wheel_filename(file["filename"])
        if str(found) == version and tags & fits:
            return read_wheel(urljoin(page, file["url"]), file["size"])
    return None


def pins(*lists: str) -> Iterator[tuple[str, str]]:
    """Names and versions that lists pin, those of the lists that they include too."""
    for name in lists:
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if line.startswith("-r "):
                yield from pins(str(Path(name).parent / line[3:]))
            elif pin := re.match(r"([\w.-]+)==([^ ;]+)", line):
                yield canonicalize_name(pin[1]), pin[2]


def eager_wheels() -> dict[str, Wheel | None]:
    """What target ``full`` has beyond ``lean`` by package; None for one without a wheel."""
    return find_wheels(dict(pins(*stages(DOCKERFILE)["eager"].requirements())))


def find_wheels(wanted: dict[str, str]) -> dict[str, Wheel | None]:
    """The wheels of packages whose versions are given."""
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(find_wheel, wanted, wanted.values())
        return dict(zip(wanted, found, strict=True))


def reference_wheels() -> dict[str, Wheel | None]:
    """PyTorch as the reference service has it, and the libraries that it pins."""
    name, version = REFERENCE
    torch = find_wheel(name, version)
    return {name: torch} | find_wheels({} if torch is None else torch.pins)


def _rows(sizes: dict[str, float]) -> list[tuple[str, float]]:
    """Large packages, largest first, and the rest together."""
    large = sorted((name for name in sizes if sizes[name] >= SHOWN), key=lambda name: -sizes[name])
    rest = [size for size in sizes.values() if size < SHOWN]
    return [(name, sizes[name]) for name in large] + [(f"{len(rest)} smaller ones", sum(rest))]


def find_python() -> str:
    """The image's Python, 3.12, where there is one; else this one."""
    for name in filter(None, (os.environ.get("IMAGE_PYTHON"), "python3.12")):
        line = [name, "-c", "import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))"]
        if shutil.which(name) and subprocess.run(line, capture_output=True, check=False).returncode == 0:
            return name
    return sys.executable


def measure_lean(python: str, plans: str) -> tuple[dict[str, float], dict[str, float]]:
    """What target ``lean`` weighs with a value of ``PLANS``: by part, and of its packages each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = make_environment(folder / "lean", python, plans)
        copy_application(folder / "app")
        compile_environment(folder / "lean", folder / "app", folder / "bytecode")
        parts = {
            "base": BASE_MB,
            "packages": size_of(site),
            "bytecode": size_of(folder / "bytecode"),
            "application": size_of(folder / "app"),
        }
        return parts, package_sizes(site)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "images.json")
    args = parser.parse_args(argv)
    python = find_python()
    measured = {plans: measure_lean(python, plans) for plans in PLANS}
    parts, packages = measured[PLANS[0]]
    version = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as name:
        copy_application(Path(name), "full")
        checkpoints = size_of(Path(name))
    wheels, reference = eager_wheels(), reference_wheels()
    reference_mb = sum(wheel.unpacked for wheel in reference.values() if wheel)
    unpacked = {name: wheel.unpacked for name, wheel in wheels.items() if wheel}
    lean, eager = sum(parts.values()), sum(unpacked.values()) + checkpoints
    for title, sizes in (("lean", packages), ("beyond it, full", unpacked)):
        print(f"{title}: packages of {SHOWN:.0f} MB and more")
        for package, size in _rows(sizes):
            print(f"  {size:8.1f}  {package:28s} {WHY.get(package, '')}")
    for part, size in parts.items():
        print(f"  {size:8.1f}  {part}")
    for plans, (of_image, of_packages) in measured.items():
        library = sum(size for package, size in of_packages.items() if package.startswith("tensorrt-"))
        print(f"lean  {sum(of_image.values()):7.0f} MB with PLANS={plans}, {library:.0f} of them")
    print(
        f"full  {lean + eager:7.0f} MB: lean and {eager:.0f} MB, as the wheels say and without bytecode"
    )
    print(f"reference service: more than {REFERENCE_BASE_MB + reference_mb:.0f} MB")
    print(f"  {REFERENCE_BASE_MB:8.1f}  {REFERENCE_BASE}, still compressed")
    print(f"  {reference_mb:8.1f}  {' '.join(REFERENCE)} and what it pins, at a worker's first start")
    print(f"bases: {BASE_SOURCE}; {REFERENCE_BASE_SOURCE}")
    result = {
        "unit": "10^6 bytes, unpacked, without engines",
        "lean": {
            plans: {"total": sum(of_image.values()), "parts": of_image, "packages": of_packages}
            for plans, (of_image, of_packages) in measured.items()
        },
        "full": {
            "total": lean + eager,
            "packages": unpacked,
            "wheels": {name: wheel.packed for name, wheel in wheels.items() if wheel},
            "application": checkpoints,
            "not_counted": ["bytecode of eager", *(name for name, wheel in wheels.items() if not wheel)],
            "how": "not installed: what the wheels' tables of contents on the package index say",
        },
        "base_source": BASE_SOURCE,
        "reference": {
            "at_least": REFERENCE_BASE_MB + reference_mb,
            "base": REFERENCE_BASE,
            "base_compressed": REFERENCE_BASE_MB,
            "base_source": REFERENCE_BASE_SOURCE,
            "packages": {name: wheel.unpacked for name, wheel in reference.items() if wheel},
        },
        **provenance({"python": version, **dict(pins(*stages(DOCKERFILE)["packages"].requirements()))}),
    }
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
