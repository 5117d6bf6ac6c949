"""Environments made of links into this one, so that a test needs no package index."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def installed(name: str) -> Distribution | None:
    """A package of this environment."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def closure(requirements: Iterable[str]) -> tuple[set[str], set[str]]:
    """Names of the packages that requirements need, directly or not: those installed here, and those that are not."""
    found: set[str] = set()
    absent: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        package = installed(name)
        if package is None:
            absent.add(name)
            continue
        found.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            waiting += [
                each
                for each in map(Requirement, package.requires or [])
                if each.marker is None or each.marker.evaluate({"extra": extra})
            ]
    return found, absent


def link_packages(names: Iterable[str], site: Path) -> None:
    """Link packages of this environment into a folder of packages."""
    for name in names:
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {".."}:
            target = site / top
            if not target.exists():
                target.symlink_to(Path(str(package.locate_file(top))).resolve())


def hard_link_packages(pins: Mapping[str, str], site: Path) -> set[str]:
    """Link the files of packages of this environment into a folder of packages.

    Parameters
    ----------
    pins : Mapping[str, str]
        Version of each package.

    Returns
    -------
    set[str]
        The packages that this environment lacks, or has in another version.
    """
    missing = set()
    for name, version in pins.items():
        package = installed(name)
        if package is None or package.version != version or package.files is None:
            missing.add(name)
            continue
        for file in package.files:
            source, target = Path(str(file.locate())), site / file
            if ".." not in file.parts and source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.hardlink_to(source)
    return missing


def make_venv(folder: Path, wheels: Iterable[Path], packages: Iterable[str]) -> Path:
    """A virtual environment with wheels installed in it and packages of this environment; its folder of commands."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    link_packages(packages, site)
    line = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--quiet"]
    line += ["--disable-pip-version-check", "install", "--no-deps", "--no-index", *map(str, wheels)]
    subprocess.run(line, check=True)
    return folder / "bin"
