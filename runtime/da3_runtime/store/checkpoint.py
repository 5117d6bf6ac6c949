"""WEIGHTS -> a checkpoint on disk: from the hub, bundled, or local. Needs no PyTorch.

A checkpoint is ``model.safetensors``. A ``config.json`` beside it is optional; it names the model. Other
weight formats are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from da3_runtime.errors import CheckpointError, SettingError
from da3_runtime.store.hub import CACHED_MODELS_DIR, HubError, hub_file
from da3_runtime.store.manifest import sha256_of
from da3_runtime.store.releases import NESTED, check_release, pinned_revision
from da3_runtime.variants import Variant, find_variant, nested_variant

HUB = "hub"
BUNDLED = "bundled"
BUNDLED_DIR = Path(__file__).resolve().parent / "bundled"
RANDOM_PREFIX = "random:"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
SDT_FILE = "sdt.safetensors"
# Header entry that marks a file with random weights; its value is ``random:SEED``.
RANDOM_KEY = "da3_engines.drawn"


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk.

    Attributes
    ----------
    weights : str
        Source of the weights: ``hub``, ``nested``, ``bundled``, ``local`` or ``random:SEED``.
    path : Path
        The safetensors file.
    repo, commit : str | None
        Hub repository and resolved commit, for hub weights.
    trained : bool
        False for random weights.
    """

    weights: str
    path: Path
    repo: str | None = None
    commit: str | None = None
    trained: bool = True

    def sha256(self, digest_of: Callable[[Path], str] = sha256_of) -> str:
        """Hex digest of the weights.

        Parameters
        ----------
        digest_of : Callable[[Path], str]
            Returns the SHA-256 of a file, now or from when it was last computed.

        Raises
        ------
        CheckpointError
            If the file cannot be read, or is not the published release that was downloaded.
        """
        try:
            digest = digest_of(self.path)
        except OSError:
            raise CheckpointError(f"{self.path.name} cannot be read; check its permissions.") from None
        check_release(self.repo, self.commit, digest)
        return digest


def find_checkpoint(
    variant: Variant, weights: str, revision: str | None = None, mount: Path = CACHED_MODELS_DIR
) -> Checkpoint:
    """The checkpoint that a ``WEIGHTS`` value names.

    Parameters
    ----------
    weights : str
        ``hub``, ``nested``, a folder with ``model.safetensors``, or a ``.safetensors`` file. For a
        variant without a hub repository, ``hub`` means its bundled checkpoint. ``nested`` is the nested
        model's checkpoint on the hub, for a variant whose network it holds.
    revision : str | None
        Branch, tag or commit of the hub repository; None for the published release.
    mount : Path
        Folder in the layout of the hub's cache that is searched first.

    Raises
    ------
    CheckpointError
        If the checkpoint is missing or damaged.
    SettingError
        If ``weights`` has none of the forms above.
    """
    if weights == HUB:
        if variant.repo is None:
            return Checkpoint(BUNDLED, _bundled(variant, WEIGHTS_FILE))
        return download(variant.repo, revision, mount)
    if weights == NESTED:
        outer = nested_variant(variant)
        if outer is None or outer.repo is None:
            raise SettingError(
                f"WEIGHTS=nested: the nested checkpoint does not hold {variant.model_id} under its "
                "license; leave WEIGHTS out."
            )
        return replace(download(outer.repo, revision, mount), weights=NESTED)
    path = Path(weights)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    elif path.suffix != ".safetensors":
        raise SettingError(
            f"WEIGHTS {weights!r} is neither 'hub', 'nested', 'random:SEED', an existing folder nor a "
            ".safetensors file; other weight formats are not supported."
        )
    if not path.is_file():
        raise CheckpointError(f"WEIGHTS {weights!r}: {path.name} does not exist.")
    if path.name == WEIGHTS_FILE:
        _check_model_name(variant, path.with_name(CONFIG_FILE))
    return Checkpoint("local", path, trained=random_seed(path) is None)


def _check_model_name(variant: Variant, config: Path) -> None:
    """Refuse a checkpoint whose ``config.json`` names another model; one that names none is ignored.

    Raises
    ------
    CheckpointError
        If the configuration is of another model.
    """
    try:
        named = find_variant(json.loads(config.read_text(encoding="utf-8"))["model_name"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SettingError):
        return
    if named not in (variant, nested_variant(variant)):
        raise CheckpointError(
            f"The checkpoint is of {named.model_id}, as its {config.name} says, not of "
            f"{variant.model_id}: set MODEL={named.model_id}, or WEIGHTS to another checkpoint."
        )


def bundled_sdt(variant: Variant) -> Checkpoint | None:
    """The trained SDT head that is bundled with a variant's checkpoint, if any."""
    if variant.repo is not None:
        return None
    return Checkpoint(BUNDLED, _bundled(variant, SDT_FILE))


def _bundled(variant: Variant, name: str) -> Path:
    path = BUNDLED_DIR / variant.model_id / name
    if not path.is_file():
        raise CheckpointError(
            f"{name} of {variant.model_id} is missing from this installation; install da3-runtime again."
        )
    return path


def find_sdt(weights: str) -> Checkpoint:
    """The SDT head of a ``SDT_WEIGHTS`` value, a ``.safetensors`` file.

    Raises
    ------
    SettingError
        If ``weights`` is not an existing ``.safetensors`` file.
    CheckpointError
        If the file is damaged.
    """
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        raise SettingError(f"SDT_WEIGHTS {weights!r} is not an existing .safetensors file.")
    seed = random_seed(path)
    return Checkpoint(seed or "local", path, trained=seed is None)


def random_seed(path: Path) -> str | None:
    """``random:SEED`` if the header of a safetensors file marks its weights as random, else None.

    Raises
    ------
    CheckpointError
        If the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            return (tensors.metadata() or {}).get(RANDOM_KEY)
    except (SafetensorError, OSError):
        raise CheckpointError(
            f"{path.name} is not a whole safetensors file; download or copy it again."
        ) from None


def download(repo: str, revision: str | None, mount: Path) -> Checkpoint:
    """A repository's checkpoint, as :func:`da3_runtime.store.hub.hub_file` finds or downloads it.

    Without a revision it is that of the published release, where one is known.

    Raises
    ------
    CheckpointError
        If the repository or the file is missing, or the hub cannot be reached.
    """
    try:
        path = hub_file(repo, WEIGHTS_FILE, revision, mount, pinned_revision(repo))
    except HubError as error:
        reason = "lacks the checkpoint" if error.is_missing else error
        raise CheckpointError(
            f"The hub repository {repo} {reason}: give network access (and HF_TOKEN where needed), "
            "pass WEIGHTS=<folder with model.safetensors>, or try MODEL=da3-nano, which is bundled."
        ) from None
    return Checkpoint(HUB, path, repo, path.parent.name)
