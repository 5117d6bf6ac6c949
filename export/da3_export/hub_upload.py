"""Engine folders -> a hub repository, in the layout that ``ENGINE_REPO`` has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from da3_export.util.progress import Progress
from da3_runtime.errors import BuildError, SettingError
from da3_runtime.store.manifest import MANIFEST_NAME, PARITY_NAME, Manifest, read_manifest, verified_path
from da3_runtime.variants import VARIANTS, Head

CARD_NAME = "README.md"


class Published(NamedTuple):
    """One engine folder to publish: its manifest, and its files below the folder of engines."""

    manifest: Manifest
    files: list[str]


def find_publishable(engine_dir: Path) -> list[Published]:
    """The engines in a folder, each whole and trained.

    Raises
    ------
    SettingError
        If the folder has no engine.
    BuildError
        If an engine has random weights.
    ManifestError, ArtefactError
        If an engine is damaged.
    """
    found = []
    for model in VARIANTS:
        for head in Head:
            folder = engine_dir / model / head
            manifest = read_manifest(folder)
            if manifest is None:
                continue
            if not manifest.trained:
                raise BuildError(
                    f"The engine of {model} with head {head} has random weights: remove it first."
                )
            for graph in manifest.graphs.values():
                for artefact in graph.artefacts.values():
                    verified_path(folder, artefact)
            names = [*sorted(manifest.file_names()), PARITY_NAME, MANIFEST_NAME]
            files = [f"{model}/{head}/{name}" for name in names if (folder / name).is_file()]
            found.append(Published(manifest, files))
    if not found:
        raise SettingError(
            f"ENGINE_DIR {engine_dir} has no engine to publish; 'make engines' builds one."
        )
    return found


def card(engines: list[Published]) -> str:
    """The repository's page: its engines, their checkpoints and licenses."""
    rows = [
        f"| {each.head} | {each.model} | {each.source.repo or each.source.weights} | "
        f"{each.source.commit or ''} | {each.licence} |"
        for each, _ in engines
    ]
    return "\n".join(
        [
            "---",
            "license: other",
            "tags: [depth-estimation, onnx, tensorrt]",
            "---",
            "# Depth Anything 3 engines",
            "",
            "Built by DA3 Engines. Each engine carries the license of the checkpoint it was made from.",
            "",
            "| head | model | checkpoint | commit | license |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def publish(engine_dir: Path, repo: str, private: bool) -> str:
    """Upload every engine of a folder in one commit; other files in the repository stay.

    Parameters
    ----------
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
        If an engine has random weights, or the hub refuses the upload.
    SettingError, ManifestError, ArtefactError
        If the folder has no engine, or a damaged one.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()

    engines = find_publishable(engine_dir)
    operations = [CommitOperationAdd(CARD_NAME, card(engines).encode())]
    operations += [
        CommitOperationAdd(name, engine_dir / name) for engine in engines for name in engine.files
    ]
    size = sum((engine_dir / name).stat().st_size for engine in engines for name in engine.files)
    api = HfApi(library_name="da3-engines")
    progress = Progress(repo, 1)
    try:
        with progress.step(f"upload {len(operations)} files, {size / 1e6:.0f} MB"):
            api.create_repo(repo, private=private, exist_ok=True)
            models = ", ".join(sorted({each.manifest.model for each in engines}))
            commit = api.create_commit(repo, operations, commit_message=f"Engines of {models}")
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise BuildError(
            f"The hub refused the upload to {repo}: {reason}. Check the name and HF_TOKEN."
        ) from None
    return commit.commit_url
