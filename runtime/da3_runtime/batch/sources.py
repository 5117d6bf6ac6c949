"""Where photos come from: folders, WebDataset tars, and tables in Parquet or JSON lines."""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from enum import StrEnum
from itertools import product
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from da3_runtime.batch.pieces import BYTES, PHOTOS, Piece, Row, escaped
from da3_runtime.batch.storage import (
    check_allowed,
    explained,
    file_system,
    is_remote,
    is_url,
    normalized,
    open_file,
)
from da3_runtime.errors import DA3Error, ImageError, SettingError
from da3_runtime.image.folder import photo_endings
from da3_runtime.output.run_manifest import Identity

FOLDER_SHARD = 10_000  # photos of a folder that make a shard
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LONGEST = 200  # bytes of a name, to which outputs add their endings; disks take 255
_NOT_UTF8 = "The name is not UTF-8: rename the photo."
_UNSAFE = "The id cannot be the name of a file: it is too long, or leads to another folder."
_WILDCARD = re.compile(r"[*?\[]")


class Kind(StrEnum):
    """Kinds of sources."""

    FOLDER = "folder"
    TAR = "tar"
    PARQUET = "parquet"
    JSON_LINES = "jsonl"


_ENDINGS = {
    ".tar": Kind.TAR,
    ".tar.gz": Kind.TAR,
    ".tgz": Kind.TAR,
    ".parquet": Kind.PARQUET,
    ".jsonl": Kind.JSON_LINES,
    ".jsonl.gz": Kind.JSON_LINES,
    ".ndjson": Kind.JSON_LINES,
}


class Columns(NamedTuple):
    """Columns of a table: the one of URLs, paths or bytes, and the one of ids if there is one."""

    image: str = "url"
    id: str | None = None


class Shard(NamedTuple):
    """A part of the source that is read by one task, from its start to its end.

    Attributes
    ----------
    name : str
        Its name in ids and in the destination.
    kind : Kind
        How it is read.
    address : str
        The tar or the table; for a folder the folder.
    rows : Sequence[Row]
        The photos of a folder.
    columns : Columns
        Of a table.
    skip : frozenset[int]
        Numbers of the pieces that are done.
    prefix : str
        Start of the paths of its results, and of ids from a column, which only its own photos may share.
    max_bytes : int
        Largest encoded photo in a tar, in bytes.
    """

    name: str
    kind: Kind
    address: str
    rows: Sequence[Row] = ()
    columns: Columns = Columns()
    skip: frozenset[int] = frozenset()
    prefix: str = ""
    max_bytes: int = sys.maxsize


def kind_of(source: str) -> Kind:
    """The kind of a source, by the end of its name."""
    name = source.lower()
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), Kind.FOLDER)


def find_shards(source: str, columns: Columns) -> list[Shard]:
    """The shards of tars or tables that a source names with braces, ``{00000..00099}``, and wildcards.

    Raises
    ------
    SettingError
        If there is none, the first cannot be read, two have one name, or a table lacks a column.
    """
    kind = kind_of(source)
    addresses: list[str] = []
    for pattern in _expanded(source):
        if not _WILDCARD.search(pattern):
            addresses.append(normalized(pattern))
            continue
        with explained(pattern):
            fs = file_system(pattern)
            addresses += sorted(fs.unstrip_protocol(name) for name in fs.glob(pattern))
    addresses = [normalized(address) for address in addresses]
    if not addresses:
        raise SettingError(f"{source}: no file has such a name.")
    with explained(addresses[0]):
        file_system(addresses[0]).info(addresses[0])
    names = _shard_names(addresses)
    shards = [Shard(name, kind, address, (), columns) for name, address in names.items()]
    if kind in (Kind.PARQUET, Kind.JSON_LINES):
        _check_columns(shards[0])
    return shards


def _expanded(source: str) -> list[str]:
    """The source with every range in braces replaced by each of its numbers."""
    parts = _RANGE.split(source)
    texts, ranges = parts[0::3], list(zip(parts[1::3], parts[2::3], strict=True))
    numbers = []
    for first, last in ranges:
        if int(last) < int(first):
            raise SettingError(f"{source}: {{{first}..{last}}} ends before it begins.")
        width = len(first)
        numbers.append([f"{number:0{width}}" for number in range(int(first), int(last) + 1)])
    return [
        "".join(text + number for text, number in zip(texts, (*each, ""), strict=True))
        for each in product(*numbers)
    ]


def _shard_names(addresses: Sequence[str]) -> dict[str, str]:
    """Addresses by the names of shards: file names, or paths from where the addresses differ."""
    plain = [_without_ending(address.rpartition("/")[2]) for address in addresses]
    if len(set(plain)) == len(plain):
        return dict(zip(plain, addresses, strict=True))
    folders = [address.split("/")[:-1] for address in addresses]
    shared = 0
    while len({tuple(each[: shared + 1]) for each in folders}) == 1 and shared < len(folders[0]):
        shared += 1
    names = ["/".join([*each[shared:], name]) for each, name in zip(folders, plain, strict=True)]
    for name, count in Counter(names).items():
        if count > 1:
            raise SettingError(f"Two files of the source are named {name}: run them separately.")
    return dict(zip(names, addresses, strict=True))


def _without_ending(name: str) -> str:
    ending = max((each for each in _ENDINGS if name.lower().endswith(each)), key=len, default="")
    return name[: len(name) - len(ending)]


def remote_photos(folder: str, without: str) -> list[Row]:
    """The photos of a folder in a bucket, sorted, except those below another folder.

    Raises
    ------
    ImageError
        If it contains none.
    SettingError
        If it cannot be listed.
    """
    with explained(folder):
        fs = file_system(folder)
        found = fs.find(folder, detail=True)
        if not found:
            fs.info(folder)
        start = len(fs._strip_protocol(folder)) + 1
        results = fs._strip_protocol(without) + "/"
    endings = photo_endings()
    names = {
        path[start:]: info["size"]
        for path, info in found.items()
        if PurePosixPath(path).suffix.lower() in endings
        and not (is_remote(without) and path.startswith(results))
        and not any(part.startswith(".") for part in path[start:].split("/"))
    }
    if not names:
        raise ImageError(f"{folder} contains no image.")
    stems = Counter(_stem(name).casefold() for name in names)
    return [
        Row(
            Identity(name, names[name]),
            name if stems[_stem(name).casefold()] > 1 else _stem(name),
            PurePosixPath(name).suffix.lower(),
            f"{folder}/{name}",
            name=PurePosixPath(name).name,
        )
        for name in sorted(names)
    ]


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def in_utf8(row: Row) -> Row:
    """The row; one with an error and an escaped id if its id or the name of its results is not UTF-8."""
    photo = row.photo._replace(id=escaped(row.photo.id))
    if photo == row.photo and row.stem == escaped(row.stem):
        return row
    return Row(photo, "", row.ending, error=row.error or _NOT_UTF8)


def folder_shards(folder: str, rows: Sequence[Row]) -> list[Shard]:
    """The shards of a folder's photos, of 10,000 photos each."""
    starts = range(0, len(rows), FOLDER_SHARD)
    return [
        Shard(f"{number:05d}", Kind.FOLDER, folder, rows[start : start + FOLDER_SHARD])
        for number, start in enumerate(starts)
    ]


def read_pieces(shard: Shard, done: Collection[str] = frozenset()) -> Iterator[Piece]:
    """Read a shard from its start to its end, as pieces; the same ones each time.

    The last piece has no photos, but the number of pieces, or the reason why the shard cannot be read.
    Of several photos of one id the first is read, and the others are rows with an error.

    Parameters
    ----------
    done : Collection[str]
        Ids of photos to leave out.
    """
    rows: list[Row] = []
    size = number = 0
    try:
        rows_read = _READERS[shard.kind](shard)
        if shard.kind is not Kind.FOLDER:
            rows_read = map(in_utf8, rows_read)
        for row in _distinct(rows_read):
            if row.photo.id in done:
                continue
            if rows and (len(rows) == PHOTOS or size + len(row.image) > BYTES):
                if number not in shard.skip:
                    yield Piece(shard.name, number, rows)
                rows, size, number = [], 0, number + 1
            rows.append(row._replace(stem=shard.prefix + row.stem))
            size += len(row.image)
    except DA3Error as error:
        yield Piece(shard.name, number, error=str(error))
        return
    if rows:
        if number not in shard.skip:
            yield Piece(shard.name, number, rows)
        number += 1
    yield Piece(shard.name, number, total=number)


def _distinct(rows: Iterator[Row]) -> Iterator[Row]:
    seen: Counter[str] = Counter()
    for row in rows:
        name = row.photo.id
        seen[name] += 1
        if seen[name] > 1 and not row.error:
            photo = row.photo._replace(id=f"{name}#{seen[name]}")
            error = f"Another photo before it has the id {name}: give each photo its own."
            yield Row(photo, row.stem, row.ending, error=error)
        else:
            yield row


def _read_folder(shard: Shard) -> Iterator[Row]:
    yield from shard.rows


def _read_tar(shard: Shard) -> Iterator[Row]:
    endings = photo_endings()
    members = 0
    file = _file_of(shard)
    with explained(shard.address), open_file(shard.address) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|*") as tar:
                for member in tar:
                    members += 1
                    folder, _, base = f"./{member.name}".rpartition("/")
                    stem, _, ending = base.partition(".")
                    ending = "." + ending.lower().rpartition(".")[2]
                    if not member.isfile() or base.startswith(".") or ending not in endings:
                        continue
                    key = f"{folder}/{stem}"
                    while key.startswith(("./", "/")):
                        key = key.removeprefix(".").removeprefix("/")
                    photo = Identity(f"{shard.name}/{key}", member.size)
                    if error := _member_error(member, key, shard.max_bytes):
                        yield Row(photo, "", ending, error=error)
                        continue
                    content = tar.extractfile(member)
                    assert content is not None
                    data = content.read()
                    if len(data) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield Row(photo, key, ending, data, name=base)
        except (tarfile.TarError, EOFError) as error:
            reason = str(error) or type(error).__name__
            yield Row(
                Identity(file),
                "",
                error=f"{file} is damaged or cut off after {members} members ({reason}): "
                "its further photos are not read.",
            )


def _member_error(member: tarfile.TarInfo, key: str, max_bytes: int) -> str:
    """Why a photo in a tar is not read; empty if it is."""
    if not _is_safe(key):
        return _UNSAFE
    if member.issparse():  # a few bytes of it may become gigabytes
        return "The photo is a sparse file in the tar: write the tar without --sparse."
    if member.size > max_bytes:
        return f"The photo has {member.size} bytes; the limit is {max_bytes} (MAX_IMAGE_BYTES)."
    return ""


def _read_parquet(shard: Shard) -> Iterator[Row]:
    import pyarrow.parquet as pq

    image, id_column = shard.columns
    names = [image] if id_column in (None, image) else [image, id_column]
    with explained(shard.address), open_file(shard.address) as stream:
        table = pq.ParquetFile(stream)
        _check_has(shard, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=PHOTOS, columns=names):
            for record in batch.to_pylist():
                yield _table_row(shard, number, record)
                number += 1


def _read_json_lines(shard: Shard) -> Iterator[Row]:
    with explained(shard.address), open_file(shard.address, "infer") as stream:
        for number, line in enumerate(filter(bytes.strip, stream)):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            yield _table_row(shard, number, record)


def _file_of(shard: Shard) -> str:
    """Name of a shard with the ending of its file."""
    folder = shard.name.rpartition("/")[0]
    return "/".join(filter(None, (folder, shard.address.rpartition("/")[2])))


def _table_row(shard: Shard, number: int, record: Any) -> Row:
    photo, stem = Identity(f"{_file_of(shard)}:{number}"), f"{number:08d}"
    if not isinstance(record, dict):
        return Row(photo, stem, error="The line is not a JSON object.")
    image, id_column = shard.columns
    if id_column is not None:
        name = record.get(id_column)
        if name is None or not str(name).strip():
            return Row(photo, stem, error=f"The row has no value in column {id_column}.")
        name = str(name)
        photo = Identity(shard.prefix + name)
        if not _is_safe(name):
            return Row(photo, stem, error=_UNSAFE)
        stem = name
    value = record.get(image)
    if isinstance(value, dict):  # an image of the library datasets
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return Row(photo._replace(size=len(value)), stem, image=value)
    if not isinstance(value, str) or not value.strip():
        return Row(photo, stem, error=f"The row has no image in column {image}.")
    value = value.strip()
    if not is_url(value):
        try:
            check_allowed(value)
        except DA3Error as error:
            return Row(photo, stem, error=str(error))
    if "://" not in value and not value.startswith("/"):
        value = f"{shard.address.rpartition('/')[0]}/{value}"
    ending = PurePosixPath(value.partition("?")[0]).suffix.lower()
    return Row(photo, stem, ending if ending in photo_endings() else "", value)


def _is_safe(name: str) -> bool:
    """Whether an id can be a path of files below the destination; it may come from strangers."""
    parts = name.split("/")
    is_short = all(len(part.encode(errors="replace")) <= _LONGEST for part in parts)
    return is_short and not {"", ".", ".."} & set(parts) and "\0" not in name


def _check_columns(shard: Shard) -> None:
    """Check the columns of the first table; raises :class:`SettingError`."""
    import pyarrow.parquet as pq

    with explained(shard.address):
        if shard.kind is Kind.PARQUET:
            with open_file(shard.address) as stream:
                _check_has(shard, pq.ParquetFile(stream).schema_arrow.names)
            return
        with open_file(shard.address, "infer") as stream:
            line = next(filter(bytes.strip, stream), b"")
        try:
            record = json.loads(line or b"{}")
        except ValueError:
            return
        if isinstance(record, dict) and record:
            _check_has(shard, list(record))


def _check_has(shard: Shard, names: Sequence[str]) -> None:
    for option, name in (("--column", shard.columns.image), ("--id-column", shard.columns.id)):
        if name is not None and name not in names:
            raise SettingError(
                f"{shard.address} has no column {name}; it has {', '.join(names)}: choose one with "
                f"{option}."
            )


_READERS = {
    Kind.FOLDER: _read_folder,
    Kind.TAR: _read_tar,
    Kind.PARQUET: _read_parquet,
    Kind.JSON_LINES: _read_json_lines,
}
