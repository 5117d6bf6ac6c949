"""The engines of a folder, artefact by artefact, and whether parity is verified."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from da3_export.util.progress import aligned
from da3_runtime.errors import ManifestError
from da3_runtime.store.manifest import PARITY_NAME, Manifest, Parity, read_manifest
from da3_runtime.store.releases import weights_name
from da3_runtime.variants import VARIANTS, Head


@dataclass(frozen=True)
class EngineRow:
    """One artefact of an engine folder.

    Attributes
    ----------
    model, head, graph : str
        The network that it computes.
    artefact : str
        Its name; empty for a folder whose manifest cannot be read.
    precision : str
        ``fp32`` or ``fp16``.
    gpus : list[str]
        Compute capabilities that a plan runs on; empty for ONNX, which runs anywhere.
    library : str
        Version of the library that built a plan; empty for ONNX.
    mb : float
        Size of its files, 10^6 bytes.
    trained : bool
        Whether every weight was trained.
    weights : str
        What the checkpoint is: a published release, ``bundled``, ``random:SEED`` or not a known release.
    parity : Parity
        ``verified`` or ``unverified``.
    reason : str
        Why parity is unverified.
    """

    model: str
    head: str
    graph: str
    artefact: str
    precision: str
    gpus: list[str]
    library: str
    mb: float
    trained: bool
    weights: str
    parity: Parity
    reason: str


def engine_rows(engine_dir: Path) -> list[EngineRow]:
    """Every artefact of every engine in a folder; no artefact is opened.

    An engine whose manifest cannot be read is one row without an artefact, with the reason.
    """
    rows = []
    for model in VARIANTS:
        for head in Head:
            folder = engine_dir / model / head
            try:
                manifest = read_manifest(folder)
            except ManifestError as error:
                fault = str(error)
                rows.append(
                    EngineRow(model, head, "", "", "", [], "", 0, False, "", Parity.UNVERIFIED, fault)
                )
                continue
            if manifest is not None:
                rows += _rows(folder, manifest)
    return rows


def _rows(folder: Path, manifest: Manifest) -> list[EngineRow]:
    report = _report(folder)
    rows = []
    for graph, entry in manifest.graphs.items():
        for name, artefact in sorted(entry.artefacts.items()):
            is_verified = artefact.parity is Parity.VERIFIED
            key = f"{graph} {name}"
            reason = "" if is_verified else _why_unverified(report, key, artefact.digest)
            rows.append(
                EngineRow(
                    model=manifest.model,
                    head=manifest.head,
                    graph=graph,
                    artefact=name,
                    precision=artefact.precision,
                    gpus=list(artefact.compute_capabilities),
                    library=artefact.library,
                    mb=round(artefact.size / 1e6, 1),
                    trained=manifest.trained,
                    weights=weights_name(manifest.source.weights, manifest.source.sha256),
                    parity=artefact.parity,
                    reason=reason,
                )
            )
    return rows


def _report(folder: Path) -> dict[str, dict[str, str]]:
    """Digests and unchecked artefacts of a parity report; both empty where it cannot be read."""
    try:
        report = json.loads((folder / PARITY_NAME).read_text(encoding="utf-8"))
        return {part: dict(report[part]) for part in ("artefacts", "not_checked")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"artefacts": {}, "not_checked": {}}


def _why_unverified(report: dict[str, dict[str, str]], key: str, sha256: str) -> str:
    """Why an artefact is unverified."""
    if not report["artefacts"]:
        return f"{PARITY_NAME} is missing or damaged; run 'make parity'"
    if report["artefacts"].get(key) != sha256:
        return f"{PARITY_NAME} is of other files; run 'make parity'"
    return report["not_checked"].get(key, "it was measured and is out of tolerance")


def list_engines(engine_dir: Path) -> str:
    """The rows as an aligned table, followed by the reasons why parity is unverified."""
    rows = engine_rows(engine_dir)
    if not rows:
        return f"No engine in {engine_dir}; 'make engines' builds one."
    head = (
        "model", "head", "graph", "artefact", "precision", "GPUs", "library", "MB", "trained", "parity",
        "weights",
    )  # fmt: skip
    lines = [head, *(_cells(row) for row in rows)]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            name = " ".join(filter(None, (f"{row.model}/{row.head}", row.graph, row.artefact)))
            reasons.setdefault(row.reason.rstrip("."), []).append(name)
    notes = [f"Unverified: {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    return "\n".join([aligned(lines), *notes])


def _cells(row: EngineRow) -> tuple[str, ...]:
    return (
        row.model,
        row.head,
        row.graph or "-",
        row.artefact or "-",
        row.precision or "-",
        " ".join(row.gpus) or "-",
        row.library or "-",
        f"{row.mb:.1f}" if row.artefact else "-",
        ("yes" if row.trained else "no") if row.artefact else "-",
        row.parity,
        row.weights or "-",
    )


def to_json(rows: list[EngineRow]) -> str:
    """The rows as a JSON list."""
    return json.dumps([asdict(row) for row in rows], indent=1)
