"""Write the hashed lists anew: every requirements/NAME.in with pins -> NAME.txt (what `make lock` runs).

A list's pins are the hand-written ones and no others, but for the CUDA packages that torch pins itself.
pip refuses a file whose hash is not in the list, and with hashes in it a list that lacks a package.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LISTS = Path(__file__).resolve().parent.parent / "requirements"
# Which build its pin takes depends on the package index.
UNHASHED = "torch-cpu"
# Brings packages that it pins itself; they exist for this platform.
TORCH, PLATFORM = "torch-cuda", "x86_64-manylinux_2_28"
# What is installed with it pins the rest of what it needs.
BESIDE_TORCH = ("runtime-common", "eager-common", "cuda-bindings")
OLDEST_PYTHON = "3.11"


def lines_of(path: Path) -> tuple[list[str], str]:
    """The lists that one includes, and its pins."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith(("#", "-r "))]
    return [line[3:] for line in lines if line.startswith("-r ")], "\n".join(pins)


def hashed(pins: str, *options: str) -> str:
    """The pins with the hashes of all their files in the index.

    Raises
    ------
    subprocess.CalledProcessError
        If the index lacks one; uv has said which.
    """
    line = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--generate-hashes"]
    line += ["--no-header", "--no-annotate", "--python-version", OLDEST_PYTHON, *options, "-"]
    done = subprocess.run(line, input=pins, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603  (our own words)
    return done.stdout


def lock(path: Path) -> str:
    """The text of a list's hashed counterpart."""
    included, pins = lines_of(path)
    text = f"# From {path.name}, by `make lock`.\n"
    text += "".join(f"-r {Path(name).stem}.txt\n" for name in included)
    if path.stem == UNHASHED:
        return f"{text}{pins}\n"
    if not pins:
        return text
    if path.stem != TORCH:
        return text + hashed(pins, "--no-deps", "--universal")
    others = "\n".join(lines_of(LISTS / f"{name}.in")[1] for name in BESIDE_TORCH)
    found = hashed(f"{pins}\n{others}", "--python-platform", PLATFORM)
    known = set(re.findall(r"^([\w.-]+)==", others.lower().replace("_", "-"), re.MULTILINE))
    entries = re.findall(r"^\S.*\n(?: .*\n)*", found, re.MULTILINE)
    return text + "".join(entry for entry in entries if entry.partition("==")[0] not in known)


def main() -> int:
    """Write every list; an old one stays where the index cannot be reached."""
    for path in sorted(LISTS.glob("*.in")):
        try:
            text = lock(path)
        except subprocess.CalledProcessError:
            sys.stderr.write(f"error: {path.name} could not be locked; uv's reason is above.\n")
            return 1
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path.stem}.txt\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
