"""Engine folders -> a hub repository, in the layout that ``ENGINE_REPO`` has."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from da3_export.util.progress import Progress
from da3_runtime.errors import BuildError, SettingError
from da3_runtime.store.hub import HubError, hub_file
from da3_runtime.store.manifest import (
    MANIFEST_NAME,
    PARITY_NAME,
    Manifest,
    Parity,
    read_manifest,
    verified_path,
)
from da3_runtime.variants import VARIANTS, Head, Variant

CARD_NAME = "README.md"
# A row of the table in the page: head and model, then the rest.
_ROW = re.compile(rf"^(\| (?:{'|'.join(Head)}) \| (?:{'|'.join(VARIANTS)}) \|)(.*)$", re.MULTILINE)


class Published(NamedTuple):
    """One engine folder to publish: its manifest, and its files below the folder of engines."""

    manifest: Manifest
    files: list[str]


def find_publishable(
    engine_dir: Path, variant: Variant | None = None, head: Head | None = None
) -> tuple[list[Published], list[str]]:
    """The trained engines in a folder, each whole, and a sentence for each untrained one.

    Parameters
    ----------
    variant, head : Variant | None, Head | None
        Only engines of this model and head; None for all. Other engines are not looked at.

    Raises
    ------
    SettingError
        If the folder has no such engine.
    BuildError
        If every such engine has random weights.
    ManifestError, ArtefactError
        If such an engine is damaged.
    """
    found, untrained = [], []
    for model in VARIANTS if variant is None else [variant.model_id]:
        for each in Head if head is None else [head]:
            folder = engine_dir / model / each
            manifest = read_manifest(folder)
            if manifest is None:
                continue
            if not manifest.trained:
                untrained.append(f"The engine of {model} with head {each} has random weights")
                continue
            for graph in manifest.graphs.values():
                for artefact in graph.artefacts.values():
                    verified_path(folder, artefact)
            names = [*sorted(manifest.file_names()), PARITY_NAME, MANIFEST_NAME]
            files = [f"{model}/{each}/{name}" for name in names if (folder / name).is_file()]
            found.append(Published(manifest, files))
    if untrained and not found:
        raise BuildError(f"{untrained[0]} and cannot be published: build it from trained weights.")
    if not found:
        model = variant.model_id if variant else "any model"
        wanted = f"{model} with head {head}" if head else model
        raise SettingError(
            f"ENGINE_DIR {engine_dir} has no engine of {wanted} to publish; 'make engines' builds one."
        )
    return found, [f"{sentence} and is left out." for sentence in untrained]


def card(engines: list[Published], published: str = "") -> str:
    """The repository's page: its engines, their checkpoints and licenses.

    Parameters
    ----------
    published : str
        The page as it is; the rows of other engines stay.
    """
    rows = dict(_ROW.findall(published))
    for manifest, _ in engines:
        source = manifest.source
        unverified = [
            f"{key} {name}"
            for key, graph in manifest.graphs.items()
            for name, artefact in graph.artefacts.items()
            if artefact.parity is Parity.UNVERIFIED
        ]
        rows[f"| {manifest.head} | {manifest.model} |"] = (
            f" {source.repo or source.weights} | {source.commit or ''} | {manifest.licence} "
            f"| {', '.join(unverified)} |"
        )
    return "\n".join(
        [
            "---",
            "license: other",
            "tags: [depth-estimation, onnx, tensorrt]",
            "---",
            "# Depth Anything 3 engines",
            "",
            "Built by DA3 Engines. Each engine carries the license of the checkpoint it was made from.",
            "Unverified artefacts were not measured against upstream's network.",
            "",
            "| head | model | checkpoint | commit | license | unverified |",
            "| --- | --- | --- | --- | --- | --- |",
            *(start + rest for start, rest in sorted(rows.items())),
            "",
        ]
    )


def to_publish(engine_dir: Path, engines: list[Published]) -> str:
    """The files that :func:`publish` uploads, one a line with its size, and their sum."""
    sizes = {name: (engine_dir / name).stat().st_size for each in engines for name in each.files}
    lines = [f"{name}  {size / 1e6:.1f} MB" for name, size in sizes.items()]
    return "\n".join([*lines, f"{len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB"])


def publish(engine_dir: Path, engines: list[Published], repo: str, private: bool) -> str:
    """Upload engines of a folder in one commit; other files in the repository stay.

    Parameters
    ----------
    engines : list[Published]
        From :func:`find_publishable`.
    repo : str
        ``owner/name``, created if it does not exist; ``HF_TOKEN`` must be able to write it.
    private : bool
        Whether a repository that is created is private.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    BuildError
        If the hub refuses the upload.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()

    operations = [
        CommitOperationAdd(name, engine_dir / name) for engine in engines for name in engine.files
    ]
    size = sum((engine_dir / name).stat().st_size for engine in engines for name in engine.files)
    api = HfApi(library_name="da3-engines")
    progress = Progress(repo, 1)
    try:
        with progress.step(f"upload {len(operations) + 1} files, {size / 1e6:.0f} MB"):
            api.create_repo(repo, private=private, exist_ok=True)
            text = card(engines, _published_card(repo))
            operations.append(CommitOperationAdd(CARD_NAME, text.encode()))
            models = ", ".join(sorted({each.manifest.model for each in engines}))
            commit = api.create_commit(repo, operations, commit_message=f"Engines of {models}")
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise BuildError(
            f"The hub refused the upload to {repo}: {reason}. Check the name and HF_TOKEN."
        ) from None
    return commit.commit_url


def _published_card(repo: str) -> str:
    """The repository's page as it is; empty if it has none."""
    try:
        path = hub_file(repo, CARD_NAME, None, mount=Path(os.devnull))
        return path.read_text(encoding="utf-8")
    except (HubError, OSError, UnicodeDecodeError):
        return ""
