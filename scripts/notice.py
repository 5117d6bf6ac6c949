"""Write NOTICE's table of packages anew: ``python scripts/notice.py``.

Name and version are those of the pinned requirements, the licence what the installed package's metadata
says. Of a package that is not installed here, such as the CUDA ones, the licence that NOTICE has already
stays. Ends with 1 where one is still to be filled in by hand.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTICE = ROOT / "NOTICE"
START, END = "Package | Version | Licence\n", "\nEnd of the packages.\n"
UNKNOWN = "?"
# What neither serves nor builds.
TOOLS = ("actions.in", "benchmark.in", "reference.in", "test-common.in", "tools.in", "train.in")
# Where the metadata has a sentence or the licence's text, or calls it by another name than SPDX.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "Dual License": "Apache-2.0 OR BSD-3-Clause",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Other/Proprietary License": "NVIDIA, proprietary",
    "Proprietary": "NVIDIA, proprietary",
}


def pins() -> dict[str, str]:
    """Version of every package that is pinned for serving or building; several with commas between."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "requirements").glob("*.in")):
        if path.name in TOOLS:
            continue
        for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE):
            versions = found.setdefault(name.lower(), [])
            if version not in versions:
                versions.append(version)
    return {name: ", ".join(sorted(versions)) for name, versions in sorted(found.items())}


def licence_of(name: str) -> str | None:
    """What the installed package says; None where it is not installed or says nothing."""
    try:
        facts = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    field = (facts["License"] or "").strip()
    classifiers = [
        entry.rpartition(" :: ")[2]
        for entry in facts.get_all("Classifier") or []
        if entry.startswith("License :: ")
    ]
    # A field of more than one line is the text, not the name.
    plain = field if field and "\n" not in field and field != "UNKNOWN" else None
    said = facts["License-Expression"] or plain or " and ".join(classifiers)
    return SPDX.get(said, said) or None


def table(known: dict[str, str]) -> list[str]:
    """The rows, with ``known`` licences where the metadata has none."""
    return [
        f"{name} | {version} | {licence_of(name) or known.get(name, UNKNOWN)}"
        for name, version in pins().items()
    ]


def main() -> int:
    """Replace the rows between the two marks."""
    head, _, rest = NOTICE.read_text().partition(START)
    old, _, tail = rest.partition(END)
    rows = [row.split(" | ") for row in old.splitlines()]
    new = table({row[0]: row[2] for row in rows if len(row) == 3})
    NOTICE.write_text(f"{head}{START}" + "\n".join(new) + f"\n{END}{tail}")
    missing = [row for row in new if row.endswith(f"| {UNKNOWN}")]
    if missing:
        sys.stderr.write("fill in by hand: " + "; ".join(missing) + "\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
