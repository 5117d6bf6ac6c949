"""The manifest of an engine folder: its artefacts, their weights, and digests of all files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from da3_runtime.errors import ArtefactError, ManifestError
from da3_runtime.network_io import TensorSpec

SCHEMA_VERSION = 3
MANIFEST_NAME = "manifest.json"
PARITY_NAME = "parity.json"
CHECKPOINT_DIR = "checkpoint"
_CHUNK = 4 * 2**20
_PIECE = 16 * 2**20  # of a file whose pieces are hashed side by side
_MOST_THREADS = 8
_EXACT = ConfigDict(extra="forbid")


class Kind(StrEnum):
    """Kinds of artefact. A graph has at most one of each kind, but any number of TensorRT plans."""

    ONNX_FP32 = "onnx-fp32"
    ONNX_FP16 = "onnx-fp16"
    ONNX_FP16_ORT = "onnx-fp16-ort"
    ONNX_BF16 = "onnx-bf16"
    ONNX_INT8 = "onnx-int8"
    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


class Parity(StrEnum):
    """Whether an artefact was measured against upstream's network and was within tolerance."""

    VERIFIED = "verified"
    UNVERIFIED = "unverified"


def artefact_name(kind: Kind, compute_capabilities: Sequence[str]) -> str:
    """Key of an artefact in its graph: its kind, and for a TensorRT plan also its GPU.

    ``tensorrt-9.0`` runs on compute capability 9.0, ``tensorrt-8.0+`` on 8.0 and later.
    """
    return "-".join([kind, *compute_capabilities]) if kind is Kind.TENSORRT else kind.value


def _plain_name(name: str) -> str:
    if Path(name).name != name:
        raise ValueError("a file name must not contain a folder")
    return name


@dataclass(frozen=True, config=_EXACT)
class File:
    """A file of the folder: its name, its digest and its size in bytes."""

    name: Annotated[str, AfterValidator(_plain_name)]
    digest: str
    size: int


@dataclass(frozen=True, config=_EXACT)
class Artefact:
    """An artefact: an ONNX file or a plan that a backend loads.

    Attributes
    ----------
    kind : Kind
        Its kind.
    files : list[File]
        The file to load, then the files of its external weights, if any.
    precision : str
        ``fp32``, ``fp16``, ``bf16`` or ``int8``.
    fingerprint : str
        Digest of everything that the file was made from; a different one means that it is out of date.
    build_seconds : float
        Seconds that the build took.
    toolchain : dict[str, str]
        Versions of the packages that made it, and the digest of the ONNX that it was made from.
    library : str
        Version of the library that built a plan; empty for ONNX.
    compute_capabilities : list[str]
        Compute capabilities of a plan: ``9.0``, or ``8.0+`` for 8.0 and later; empty for ONNX.
    version_compatible : bool
        Whether ``tensorrt-lean`` of the same release can run a TensorRT plan too.
    parity : Parity
        Verified once these files were measured and were within tolerance.
    """

    kind: Kind
    files: list[File]
    precision: str
    fingerprint: str
    build_seconds: float
    toolchain: dict[str, str]
    library: str = ""
    compute_capabilities: list[str] = field(default_factory=list)
    version_compatible: bool = False
    parity: Parity = Parity.UNVERIFIED

    @property
    def name(self) -> str:
        """Its key in the graph."""
        return artefact_name(self.kind, self.compute_capabilities)

    @property
    def digest(self) -> str:
        """Digest of the digests of its files."""
        return hashlib.sha256("".join(file.digest for file in self.files).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Size of all its files, in bytes."""
        return sum(file.size for file in self.files)


def _named(artefacts: dict[str, Artefact]) -> dict[str, Artefact]:
    if any(name != artefact.name for name, artefact in artefacts.items()):
        raise ValueError("the key of an artefact must match its kind and GPUs")
    return artefacts


@dataclass(frozen=True, config=_EXACT)
class Source:
    """The checkpoint that the engine was made from.

    Attributes
    ----------
    weights : str
        ``hub``, ``nested``, ``bundled``, ``local`` or ``random:SEED``.
    sha256 : str
        Digest of ``model.safetensors``.
    repo, commit : str | None
        Hub repository and resolved commit.
    trained : bool
        False for random weights: the depth means nothing.
    release : str
        What the weights are, in words; empty in manifests of earlier builds.
    """

    weights: str
    sha256: str
    repo: str | None
    commit: str | None
    trained: bool
    release: str = ""


@dataclass(frozen=True, config=_EXACT)
class Profile:
    """A range of shapes of the images, [B, S, H, W, 3], that a plan supports."""

    minimum: list[int]
    optimum: list[int]
    maximum: list[int]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an input of ``shape`` is in the range."""
        bounds = zip(self.minimum, shape, self.maximum, strict=True)
        return all(low <= side <= high for low, side, high in bounds)


@dataclass(frozen=True, config=_EXACT)
class GraphEntry:
    """One graph of the engine: its tensors, and its artefacts by name."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    artefacts: Annotated[dict[str, Artefact], AfterValidator(_named)]

    def of_kind(self, kind: Kind) -> list[Artefact]:
        """Its artefacts of a kind: any number for TensorRT plans, else at most one."""
        return [artefact for artefact in self.artefacts.values() if artefact.kind is kind]


@dataclass(frozen=True, config=_EXACT)
class Manifest:
    """Description of an engine folder, complete enough to choose and verify what to load."""

    model: str
    head: str
    licence: str
    unit: str
    source: Source
    head_source: Source | None
    side_multiple: int
    profiles: list[Profile]
    graphs: dict[str, GraphEntry]
    schema_version: int = SCHEMA_VERSION

    @property
    def trained(self) -> bool:
        """Whether all weights are trained."""
        return self.source.trained and (self.head_source is None or self.head_source.trained)

    def digests(self) -> dict[str, str]:
        """:attr:`Artefact.digest` of every artefact, by ``GRAPH NAME``."""
        return {
            f"{key} {name}": entry.digest
            for key, graph in self.graphs.items()
            for name, entry in graph.artefacts.items()
        }

    def with_parity(self, parity: Mapping[str, Parity]) -> Manifest:
        """The same manifest with the given parity of each artefact, by ``GRAPH NAME``."""
        graphs = {
            key: replace(
                graph,
                artefacts={
                    name: replace(entry, parity=parity[f"{key} {name}"])
                    for name, entry in graph.artefacts.items()
                },
            )
            for key, graph in self.graphs.items()
        }
        return replace(self, graphs=graphs)

    def file_names(self) -> set[str]:
        """Names of every artefact's files."""
        entries = (entry for graph in self.graphs.values() for entry in graph.artefacts.values())
        return {file.name for entry in entries for file in entry.files}

    def to_json(self) -> str:
        """The manifest as JSON text; equal manifests give equal text."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of an engine folder; None if the folder has no manifest.

    Raises
    ------
    ManifestError
        If the file cannot be read, is damaged, or has another schema version.
    """
    try:
        text = (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError):
        raise ManifestError(
            f"{MANIFEST_NAME} of {folder.name} cannot be read; check its permissions, or build the "
            "engine again."
        ) from None
    try:
        data = json.loads(text)
        schema = data["schema_version"]
        if isinstance(schema, int) and schema < SCHEMA_VERSION:
            raise ManifestError(
                "The engine was built by an earlier release, for one photo only "
                f"(schema version {schema} instead of {SCHEMA_VERSION}); build it again."
            )
        return _parse(data)
    except (ValidationError, KeyError, TypeError, ValueError):
        raise ManifestError(
            f"{MANIFEST_NAME} is damaged or not of schema version {SCHEMA_VERSION}; "
            "build the engine again."
        ) from None


def _parse(data: dict[str, Any]) -> Manifest:
    if data["schema_version"] != SCHEMA_VERSION:
        raise ValueError("schema_version")
    return Manifest(**data)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in chunks.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """Digest of an artefact's file in hexadecimal: SHA-256 of the SHA-256 of its pieces of 16 MiB.

    As hard to forge as SHA-256, but the pieces are hashed on several threads.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    starts = range(0, path.stat().st_size, _PIECE)
    threads = min(_MOST_THREADS, os.cpu_count() or 1, max(1, len(starts)))
    with ThreadPoolExecutor(threads) as pool:
        pieces = pool.map(partial(_piece_digest, path), starts)
        return hashlib.sha256(b"".join(pieces)).hexdigest()


def _piece_digest(path: Path, start: int) -> bytes:
    digest, left = hashlib.sha256(), _PIECE
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left and (chunk := stream.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()


def describe(path: Path) -> File:
    """Name, digest and size of a file on disk."""
    return File(path.name, digest_of(path), path.stat().st_size)


def verified_path(
    folder: Path, artefact: Artefact, find_digest: Callable[[Path], str] = digest_of
) -> Path:
    """Verify size and digest of all files of an artefact; returns the path of the file to load.

    Parameters
    ----------
    find_digest : Callable[[Path], str]
        Returns :func:`digest_of` of a file, now or from when it was last computed.

    Raises
    ------
    ArtefactError
        If a file is missing, or differs from the manifest in size or content; the message names it.
    """
    for file in artefact.files:
        path = folder / file.name
        try:
            size = path.stat().st_size
            if size != file.size:
                raise ArtefactError(f"{file.name} has {size} bytes; its manifest says {file.size}.")
            if find_digest(path) != file.digest:
                raise ArtefactError(f"{file.name} does not match the digest in its manifest.")
        except OSError:
            raise ArtefactError(f"{file.name} is missing or cannot be read.") from None
    return folder / artefact.files[0].name
