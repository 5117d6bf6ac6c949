"""Where results go: a folder of files, tars as WebDataset has them, or Parquet.

Tars and Parquet are first written piece by piece, to ``_pieces``. Once all pieces of a shard are there,
they are joined. So a killed run loses only pieces that were not complete.
"""

from __future__ import annotations

import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from da3_runtime.batch.pieces import JSON, Done, Piece, Row, escaped
from da3_runtime.batch.storage import Place, explained
from da3_runtime.errors import OutputError
from da3_runtime.output.encode import Output, Wanted
from da3_runtime.output.run_manifest import failed_line
from da3_runtime.postprocess.camera import Camera

if TYPE_CHECKING:
    import pyarrow as pa

PIECES = "_pieces"
MANIFEST = "manifest"
SCRATCH = ".manifest.unfinished"  # as RunManifest has it


class Files(NamedTuple):
    """What was made of a photo.

    Attributes
    ----------
    files : Mapping[Output, bytes | None]
        None if the model lacks the output.
    line : JSON
        Its line of the manifest. Its paths, in ``outputs``, are set by the destination.
    error : str
        Why it failed; empty if it did not.
    """

    row: Row
    files: Mapping[Output, bytes | None]
    line: JSON
    error: str = ""


@dataclass(frozen=True)
class Destination(ABC):
    """Where the results of a run go.

    Parameters
    ----------
    place : Place
        Its folder.
    wanted : Wanted
        The outputs.
    """

    place: Place
    wanted: Wanted

    @property
    def outputs(self) -> list[Output]:
        """The wanted outputs that have a file."""
        return [output for output in self.wanted.outputs if output.row.ending]

    def finished(self) -> set[str]:
        """Names of the shards that are complete."""
        return set()

    def pieces(self) -> dict[str, set[int]]:
        """Numbers of the pieces that are done, of every shard that is not complete."""
        return {}

    def final_files(self, shard: str) -> list[str]:
        """The files of a complete shard, the one whose presence means that it is complete last."""
        return []

    @abstractmethod
    def write(self, piece: Piece, made: Sequence[Files], done: Done) -> Sequence[Files]:
        """Write the results of a piece; the same ones if it is repeated.

        Parameters
        ----------
        done : Done
            Gets the lines of the manifest that the driver writes.

        Returns
        -------
        Sequence[Files]
            The results; photos whose names the destination refuses have become failed ones.

        Raises
        ------
        SettingError
            If they cannot be written.
        """

    def finish(self, shard: str, total: int) -> None:
        """Complete a shard of so many pieces, all of which are written; raises as :meth:`write`."""
        return

    def clean(self) -> None:
        """Remove what only an incomplete run needs, once all shards are complete."""
        return


class FolderDestination(Destination):
    """Files as ``da3-runtime depth`` writes them, and their lines in ``manifest.jsonl``."""

    def write(self, piece: Piece, made: Sequence[Files], done: Done) -> Sequence[Files]:
        scratch = self.place.path and self.place.path / SCRATCH
        if scratch:
            scratch.mkdir(parents=True, exist_ok=True)
        written = [self._written(each, scratch) for each in made]
        done.lines += [each.line for each in written]
        return written

    def _written(self, each: Files, scratch: Path | None) -> Files:
        """The results of a photo after its files are written, with their paths."""
        if each.error:
            return each
        paths: dict[str, str | None] = {}
        for output, data in each.files.items():
            name = f"{each.row.stem}{output.row.ending}"
            try:
                if data is not None:
                    self.place.write(name, data, scratch)
            except OutputError:
                return failed(
                    each.row,
                    f"{PurePosixPath(name).name}: a result's name, with its own ending, is longer than "
                    "the disk accepts; rename the photo.",
                )
            paths[output.value] = None if data is None else name
        return each._replace(line={**each.line, "outputs": paths})


class ShardDestination(Destination):
    """One set of files for each shard, made of pieces."""

    @abstractmethod
    def _join(self, shard: str, pieces: Iterator[pa.Table], paths: Sequence[Path]) -> None:
        """Write the final files to these paths."""

    def pieces(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = defaultdict(set)
        for name in self.place.names(PIECES):
            folder, _, file = name.rpartition("/")
            number = file.removesuffix(".parquet")
            if number.isdigit() and file != number:
                found[folder.removeprefix(f"{PIECES}/")].add(int(number))
        return found

    def write(self, piece: Piece, made: Sequence[Files], done: Done) -> Sequence[Files]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = piece_schema(self.outputs)
        records = [
            each.line
            | {name: each.line.get(name) for name in schema.names}
            | {output.value: data for output, data in each.files.items()}
            | {"line": json.dumps(each.line), "stem": each.row.stem}
            for each in made
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records, schema), buffer, **_PARQUET)
        self.place.write(_piece_name(piece.shard, piece.number), buffer.getvalue())
        return made

    def finish(self, shard: str, total: int) -> None:
        folder, names = f"{PIECES}/{shard}", self.final_files(shard)
        if not self.place.names(names[-1]):
            with self.place.writing(names, folder) as paths, explained(self.place.at(folder)):
                self._join(shard, self._read(shard, total), paths)
        self.place.remove(folder)

    def clean(self) -> None:
        if not self.place.names(PIECES):
            self.place.remove(PIECES)

    def _read(self, shard: str, total: int) -> Iterator[pa.Table]:
        import pyarrow.parquet as pq

        for number in range(total):
            yield pq.read_table(io.BytesIO(self.place.read(_piece_name(shard, number))))


class TarDestination(ShardDestination):
    """A tar for each shard and output, and ``manifest/SHARD.jsonl``."""

    def finished(self) -> set[str]:
        names = self.place.names(MANIFEST)
        return {name.removeprefix(f"{MANIFEST}/").removesuffix(".jsonl") for name in names}

    def final_files(self, shard: str) -> list[str]:
        tars = [f"{output.value}/{shard}.tar" for output in self.outputs]
        return [*tars, f"{MANIFEST}/{shard}.jsonl"]

    def _join(self, shard: str, pieces: Iterator[pa.Table], paths: Sequence[Path]) -> None:
        *tar_paths, manifest = paths
        used: set[str] = set()
        with ExitStack() as stack:
            lines = stack.enter_context(manifest.open("w"))
            tars = {
                output: stack.enter_context(tarfile.open(path, "w", format=tarfile.PAX_FORMAT))
                for output, path in zip(self.outputs, tar_paths, strict=True)
            }
            for piece in pieces:
                for record in piece.to_pylist():
                    line = json.loads(record["line"])
                    if "error" not in line:
                        stem = _member_stem(record["stem"], used)
                        line["outputs"] = {
                            output.value: _add(tars[output], shard, output, stem, record[output.value])
                            for output in self.outputs
                        }
                    lines.write(json.dumps(line) + "\n")


class ParquetDestination(ShardDestination):
    """A Parquet file for each shard: what a line of the manifest has, and the outputs' files."""

    def finished(self) -> set[str]:
        names = {name for name in self.place.names() if not name.startswith(f"{PIECES}/")}
        return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}

    def final_files(self, shard: str) -> list[str]:
        return [f"{shard}.parquet"]

    def _join(self, shard: str, pieces: Iterator[pa.Table], paths: Sequence[Path]) -> None:
        import pyarrow.parquet as pq

        schema = final_schema(self.outputs)
        with pq.ParquetWriter(paths[0], schema, **_PARQUET) as writer:
            for piece in pieces:
                writer.write_table(piece.select(schema.names))


# Files in a column are compressed already, and each is another one.
_PARQUET: Any = {"compression": "none", "use_dictionary": False, "write_statistics": False}


def final_schema(outputs: Sequence[Output]) -> pa.Schema:
    """Columns of a Parquet file of results: each line's facts, and a column of files for each output."""
    import pyarrow as pa

    matrix = pa.list_(pa.list_(pa.float64()))
    types = {
        str: pa.string(),
        float: pa.float64(),
        Camera: pa.struct([("intrinsics", matrix), ("extrinsics", matrix)]),
    }
    columns = {name: pa.string() for name in ("id", "error")}
    columns |= {"size": pa.int64(), "mtime": pa.float64()}
    columns |= {output.value: pa.binary() for output in outputs}
    columns |= {name: types[fact.type] for each in Output for name, fact in each.row.facts.items()}
    columns |= {"min_depth": pa.float64(), "max_depth": pa.float64(), "is_metric": pa.bool_()}
    columns |= {"width": pa.int32(), "height": pa.int32(), "warnings": pa.list_(pa.string())}
    for name in ("unit", "focal_source", "model_id", "head", "head_type", "engine", "precision"):
        columns[name] = pa.string()
    for name in ("backend", "parity", "license"):
        columns[name] = pa.string()
    return pa.schema(list(columns.items()))


def piece_schema(outputs: Sequence[Output]) -> pa.Schema:
    """Columns of a piece: those of the final file, the manifest's line as text, and the stem."""
    import pyarrow as pa

    schema = final_schema(outputs)
    return schema.append(pa.field("line", pa.string())).append(pa.field("stem", pa.string()))


def _piece_name(shard: str, number: int) -> str:
    return f"{PIECES}/{shard}/{number:06d}.parquet"


def _member_stem(stem: str, used: set[str]) -> str:
    """A stem without periods in its last part, where WebDataset ends it, that no other member has."""
    path = PurePosixPath(stem)
    plain = found = str(path.with_name(path.name.replace(".", "_")))
    number = 1
    while found in used:
        number += 1
        found = f"{plain}_{number}"
    used.add(found)
    return found


def _add(tar: tarfile.TarFile, shard: str, output: Output, stem: str, data: bytes | None) -> str | None:
    """Add an output's file to its tar; returns the path for the manifest."""
    if data is None:
        return None
    member = tarfile.TarInfo(f"{stem}.{output.row.ending.rpartition('.')[2]}")
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return f"{output.value}/{shard}.tar/{member.name}"


DESTINATIONS: dict[str, type[Destination]] = {
    "folder": FolderDestination,
    "tar": TarDestination,
    "parquet": ParquetDestination,
}


def failed(row: Row, error: str) -> Files:
    """The results of a photo that failed."""
    error = escaped(error)  # it may name a file
    return Files(row, {}, failed_line(row.photo, error), error)
