"""The figures of an evaluation as a table, as JSON, and as an image of the worst cases."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_export.accuracy.datasets import ABOUT_NAME
from da3_export.accuracy.evaluate import Case, Evaluation, Figures, Request
from da3_export.accuracy.metrics import Alignment, is_known
from da3_export.accuracy.ways import EAGER_FP32
from da3_export.util.progress import aligned
from da3_runtime.util.files import write_atomically

TABLE_NAME, JSON_NAME, WORST_NAME = "table.txt", "figures.json", "worst.jpg"
# A known depth of so many times the depth in meters, or of one over it, is rarely the network's fault.
FACTOR_LIMIT = 5.0
LARGEST_ERROR = 0.5  # relative, of the color at the end of the scale

# Names in the table, and how they are written.
_NAMES = {
    "abs_rel": "AbsRel",
    "rmse": "RMSE",
    "log10": "log10",
    "delta1": "delta1",
    "delta2": "delta2",
    "delta3": "delta3",
    "silog": "SILog",
    "auc5": "AUC 5",
    "auc15": "AUC 15",
    "auc30": "AUC 30",
}
# Somebody else's figures. Theirs are of all 697 photos; annotated depth exists for 652 of them.
_PUBLISHED_KITTI = {
    "source": "project changh95/tt-Depth-Anything-3, README; not measured here",
    "data": "DA3METRIC-LARGE on KITTI Eigen, 697 images; crop, alignment and known depth are not stated",
    "fp32": {"abs_rel": 0.0906, "delta1": 0.9591},
    "bf16": {"abs_rel": 0.0930},
}
_BACKGROUND, _INK, _GAP, _TITLE = 255, (40, 40, 40), 6, 22


def table(evaluation: Evaluation) -> str:
    """The figures, their differences to eager, and remarks, as aligned text."""
    figures = evaluation.figures
    names = list(figures[0].errors)
    titles = [_NAMES[name] for name in names]
    rows = [("head", "run as", *titles, "scaling", "photos")]
    for f in figures:
        errors = (
            f"{f.errors[name]:.4g}" if name == "rmse" else f"{f.errors[name]:.4f}" for name in names
        )
        rows.append((f.head, f.how, *errors, f.scaling, str(f.photos)))
    differences = [("head", "minus eager", *titles)]
    differences += [
        (f.head, f.how, *(f"{f.difference[name]:+.1e}" for name in names))
        for f in figures
        if f.difference and f.how != EAGER_FP32
    ]
    parts = [aligned(rows)]
    if len(differences) > 1:
        parts.append(aligned(differences))
    return "\n\n".join([*parts, *_remarks(evaluation)])


def _remarks(evaluation: Evaluation) -> list[str]:
    remarks = []
    if not any(f.difference for f in evaluation.figures):
        remarks.append(f"{EAGER_FP32} did not run, so the differences to it are not known: see the log.")
    if evaluation.figures[0].scaling == Alignment.NONE and not (
        1 / FACTOR_LIMIT < evaluation.factor < FACTOR_LIMIT
    ):
        remarks.append(
            f"The known depth is {evaluation.factor:.3g} times the depth in meters (median): check "
            "--depth-scale and the focal length."
        )
    published = _published(evaluation)
    if published:
        remarks.append(
            "For comparison, somebody else's measurement ({source}): {data}: "
            "FP32 AbsRel {fp32[abs_rel]:.4f}, delta1 {fp32[delta1]:.4f}; bf16 AbsRel "
            "{bf16[abs_rel]:.4f}.".format(**published)
        )
    return remarks


def _published(evaluation: Evaluation) -> dict[str, Any]:
    is_kitti = str(evaluation.settings["dataset"]).startswith("kitti")
    return _PUBLISHED_KITTI if is_kitti else {}


def to_json(evaluation: Evaluation, request: Request) -> str:
    """The figures with the data, settings, machine, package versions and commit that they are of."""
    settings = dict(evaluation.settings)
    folder = request.source.path
    about = folder / ABOUT_NAME
    content = {
        "model": settings.pop("model"),
        "data": json.loads(about.read_text(encoding="utf-8")) if about.is_file() else folder.name,
        "device": settings.pop("device"),
        "versions": settings.pop("versions"),
        "commit": _commit(),
        "settings": settings,
        "figures": [_row(f) for f in evaluation.figures],
    }
    published = _published(evaluation)
    if published:
        content["published"] = published
    return json.dumps(content, indent=1) + "\n"


def _commit() -> str:
    """The commit of this package's clone; empty without a clone or without git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _row(figures: Figures) -> dict[str, object]:
    row = asdict(figures)
    errors, difference = (_rounded(row.pop(name)) for name in ("errors", "difference"))
    digest = row.pop("digest")
    return {"head": row.pop("head"), "how": row.pop("how"), **errors, **row,
            "digest": digest, "minus_eager": difference}  # fmt: skip


def _rounded(errors: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 8) for name, value in errors.items()}


def write_report(evaluation: Evaluation, request: Request, out: Path) -> None:
    """Write the table, the JSON and the image of the worst cases to a folder."""
    write_atomically(out / TABLE_NAME, (table(evaluation) + "\n").encode())
    write_atomically(out / JSON_NAME, to_json(evaluation, request).encode())
    write_atomically(out / WORST_NAME, worst_image(evaluation))


def worst_image(evaluation: Evaluation) -> bytes:
    """JPEG of the worst cases, a row each: photo, known depth, depth and relative error."""
    first = evaluation.figures[0]
    rows = [
        _case_row(case, f"{first.head}, {first.how}, scaling {first.scaling}")
        for case in evaluation.worst
    ]
    width = max(row.shape[1] for row in rows)
    padded = [
        cv2.copyMakeBorder(
            row, 0, _GAP, 0, width - row.shape[1], cv2.BORDER_CONSTANT, value=(_BACKGROUND,) * 3
        )
        for row in rows
    ]
    return bytes(cv2.imencode(".jpg", np.vstack(padded), [cv2.IMWRITE_JPEG_QUALITY, 90])[1])


def _case_row(case: Case, how: str) -> NDArray[np.uint8]:
    known = is_known(case.truth)
    low, high = np.percentile(case.truth[known], (1, 99))
    error = np.abs(case.depth - case.truth) / np.where(known, case.truth, 1)
    panels = {
        f"{case.name}": case.rgb[..., ::-1],
        f"known depth, {low:.3g} to {high:.3g}": _colored(case.truth, low, high, known),
        f"depth: {how}": _colored(case.depth, low, high),
        f"error, 0 to {LARGEST_ERROR:.0%}; AbsRel {case.abs_rel:.3f}": _colored(
            error, 0, LARGEST_ERROR, known
        ),
    }
    return np.hstack([_titled(panel, title) for title, panel in panels.items()])


def _colored(
    values: NDArray[Any], low: float, high: float, known: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """A map through a color map, from dark (low) to bright (high); unknown pixels are gray."""
    gray = np.clip((values - low) / max(high - low, 1e-12) * 255, 0, 255).astype(np.uint8)
    color = np.asarray(cv2.applyColorMap(gray, cv2.COLORMAP_INFERNO), np.uint8)
    if known is not None:
        color[~known] = 128
    return color


def _titled(panel: NDArray[np.uint8], title: str) -> NDArray[np.uint8]:
    """A panel below a line of text, as much of its end as fits."""
    framed = cv2.copyMakeBorder(panel, _TITLE, 0, 0, _GAP, cv2.BORDER_CONSTANT, value=(_BACKGROUND,) * 3)
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.4
    text = title.encode("ascii", "replace").decode()
    while len(text) > 1 and cv2.getTextSize(text, font, size, 1)[0][0] > panel.shape[1]:
        text = text[1:]
    return np.asarray(
        cv2.putText(framed, text, (0, _TITLE - 7), font, size, _INK, 1, cv2.LINE_AA), np.uint8
    )
