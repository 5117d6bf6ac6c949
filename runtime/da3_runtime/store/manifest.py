"""The engine folder's manifest: what was built, from which weights, and how to tell it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from da3_runtime.errors import ArtefactError, ManifestError
from da3_runtime.network_io import TensorSpec

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
PARITY_NAME = "parity.json"
CHECKPOINT_DIR = "checkpoint"
_CHUNK = 4 * 2**20


class Kind(StrEnum):
    """Kinds of artefact. A graph has one of each, but any number of TensorRT plans."""

    ONNX_FP32 = "onnx-fp32"
    ONNX_FP16 = "onnx-fp16"
    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


def artefact_name(kind: Kind, compute_capabilities: Sequence[str]) -> str:
    """Key of an artefact in its graph: the kind; of a TensorRT plan also the GPU it is for.

    ``tensorrt-9.0`` runs on compute capability 9.0, ``tensorrt-8.0+`` on 8.0 and later.
    """
    return "-".join([kind, *compute_capabilities]) if kind is Kind.TENSORRT else kind.value


@dataclass(frozen=True)
class File:
    """A file of the folder: its name, digest and bytes."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Artefact:
    """One thing that a backend loads.

    Attributes
    ----------
    kind : Kind
        What it is.
    files : list[File]
        The file to load, then the weights it refers to where they lie apart (ONNX above 2 GB).
    precision : str
        ``fp32`` or ``fp16``.
    fingerprint : str
        Digest of everything the file was made from; another one means out of date.
    build_seconds : float
        Seconds that making it took.
    toolchain : dict[str, str]
        Package versions that made it, and the ONNX it was made from.
    library : str
        Version of the library that built a plan; empty for ONNX.
    compute_capabilities : list[str]
        GPUs a plan was built for, ``9.0`` or, with all later ones, ``8.0+``; empty for ONNX.
    version_compatible : bool
        Whether ``tensorrt-lean`` of its library's release runs a TensorRT plan too.
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

    @property
    def name(self) -> str:
        """Its key in the graph."""
        return artefact_name(self.kind, self.compute_capabilities)

    @property
    def sha256(self) -> str:
        """Digest over the digests of its files."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Source:
    """The checkpoint the engine was made from.

    Attributes
    ----------
    weights : str
        ``hub``, ``bundled``, ``local`` or ``random:SEED``.
    sha256 : str
        Digest of ``model.safetensors``.
    repo, commit : str | None
        Hub repository and resolved commit.
    trained : bool
        False for drawn weights: the depth means nothing.
    """

    weights: str
    sha256: str
    repo: str | None
    commit: str | None
    trained: bool


@dataclass(frozen=True)
class Profile:
    """A range of input shapes [B, H, W, 3] that a plan runs."""

    minimum: list[int]
    optimum: list[int]
    maximum: list[int]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an input of ``shape`` lies in the range."""
        bounds = zip(self.minimum, shape, self.maximum, strict=True)
        return all(low <= side <= high for low, side, high in bounds)


@dataclass(frozen=True)
class GraphEntry:
    """One graph of the engine: its tensors, and its artefacts by name."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    artefacts: dict[str, Artefact]

    def of_kind(self, kind: Kind) -> list[Artefact]:
        """Its artefacts of a kind: at most one, or any number of TensorRT plans."""
        return [artefact for artefact in self.artefacts.values() if artefact.kind is kind]


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know about an engine folder before it loads a byte of it."""

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
        """Whether every weight was trained."""
        return self.source.trained and (self.head_source is None or self.head_source.trained)

    def file_names(self) -> set[str]:
        """Names of every artefact's files."""
        entries = (entry for graph in self.graphs.values() for entry in graph.artefacts.values())
        return {file.name for entry in entries for file in entry.files}

    def to_json(self) -> str:
        """The manifest's text, stable for equal manifests."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an engine folder, or None where there is none.

    Raises
    ------
    ManifestError
        If the file is there but cannot be read, or has another schema version.
    """
    try:
        text = (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError):
        raise ManifestError(f"{MANIFEST_NAME} of {folder.name} cannot be read.") from None
    try:
        return _parse(json.loads(text))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError):
        raise ManifestError(
            f"{MANIFEST_NAME} is damaged or not of schema version {SCHEMA_VERSION}; "
            "build the engine again."
        ) from None


def _parse(data: dict[str, Any]) -> Manifest:
    if data["schema_version"] != SCHEMA_VERSION:
        raise ValueError("schema_version")
    manifest = Manifest(
        **{
            **data,
            "source": Source(**data["source"]),
            "head_source": Source(**data["head_source"]) if data["head_source"] else None,
            "profiles": [Profile(**profile) for profile in data["profiles"]],
            "graphs": {name: _parse_graph(graph) for name, graph in data["graphs"].items()},
        }
    )
    if any(Path(name).name != name for name in manifest.file_names()):
        raise ValueError("file")
    return manifest


def _parse_graph(data: dict[str, Any]) -> GraphEntry:
    artefacts = {name: _parse_artefact(entry) for name, entry in data["artefacts"].items()}
    if any(name != artefact.name for name, artefact in artefacts.items()):
        raise ValueError("artefacts")
    return GraphEntry(
        inputs=[TensorSpec(**spec) for spec in data["inputs"]],
        outputs=[TensorSpec(**spec) for spec in data["outputs"]],
        artefacts=artefacts,
    )


def _parse_artefact(data: dict[str, Any]) -> Artefact:
    files = [File(**file) for file in data["files"]]
    return Artefact(**{**data, "kind": Kind(data["kind"]), "files": files})


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in chunks.

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


def describe(path: Path) -> File:
    """Name, digest and size of a file on disk."""
    return File(path.name, sha256_of(path), path.stat().st_size)


def verified_path(folder: Path, artefact: Artefact) -> Path:
    """Path to load of an artefact all of whose files match the manifest in size and digest.

    Raises
    ------
    ArtefactError
        Saying which file is missing, of another size, or of other content.
    """
    for file in artefact.files:
        path = folder / file.name
        try:
            size = path.stat().st_size
            if size != file.size:
                raise ArtefactError(f"{file.name} has {size} bytes; its manifest says {file.size}.")
            if sha256_of(path) != file.sha256:
                raise ArtefactError(f"{file.name} does not match the digest in its manifest.")
        except OSError:
            raise ArtefactError(f"{file.name} is missing or cannot be read.") from None
    return folder / artefact.files[0].name
