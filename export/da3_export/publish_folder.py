"""Staging folder -> engine folder.

The old manifest is removed first, then the artefacts move in, and the new manifest comes last. A reader
in between, or after a crash, finds a folder without a manifest, which does not count as an engine.
"""

from __future__ import annotations

from pathlib import Path

from da3_export.parity.report import Report
from da3_runtime.store.checkpoint import SDT_FILE
from da3_runtime.store.manifest import CHECKPOINT_DIR, MANIFEST_NAME, PARITY_NAME, Manifest
from da3_runtime.util.files import write_atomically


def publish_folder(folder: Path, staging: Path, manifest: Manifest, report: Report) -> None:
    """Make ``folder`` the engine that ``manifest`` describes.

    Files of the manifest that are not in ``staging`` must already be in ``folder``; all other files in
    ``folder`` are removed.

    Raises
    ------
    OSError
        If a file cannot be moved or written.
    """
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    names = manifest.file_names()
    for path in folder.iterdir():
        if path.is_file() and path.name not in names:
            path.unlink()
    for name in names:
        staged = staging / name
        if staged.exists():
            staged.replace(folder / name)
    _publish_random_weights(folder / CHECKPOINT_DIR, staging / CHECKPOINT_DIR, manifest)
    write_atomically(folder / PARITY_NAME, report.to_json().encode())
    write_atomically(folder / MANIFEST_NAME, manifest.to_json().encode())


def _publish_random_weights(folder: Path, staged: Path, manifest: Manifest) -> None:
    """Move random weights beside the engine, and remove weights that it was not made from."""
    folder.mkdir(exist_ok=True)
    if staged.exists():
        for path in staged.iterdir():
            path.replace(folder / path.name)
    if manifest.source.trained:
        for path in folder.iterdir():
            if path.name != SDT_FILE:
                path.unlink()
    if manifest.head_source is None or manifest.head_source.trained:
        (folder / SDT_FILE).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
