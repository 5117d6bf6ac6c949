"""Folders on a disk or in a bucket: reading, and writing of whole files only."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from da3_runtime.errors import DA3Error, ImageTooLargeError, OutputError, SettingError
from da3_runtime.util.files import write_atomically

# The protocols of buckets, and the packages that bring them; only huggingface_hub is always installed.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}


def is_remote(address: str) -> bool:
    """Whether an address names a protocol other than that of local files."""
    protocol, separator, _ = address.partition("://")
    return bool(separator) and protocol != "file"


def is_url(address: str) -> bool:
    """Whether an address is of http or https, which only :func:`download` may read."""
    return address.lower().startswith(("http://", "https://"))


def check_allowed(address: str) -> None:
    """Refuse addresses that fsspec would pass on to other protocols, such as ``simplecache::http://``.

    Raises
    ------
    SettingError
        If the address is neither a local path nor in a bucket.
    """
    protocol, separator, _ = address.partition("://")
    if "::" in address or (separator and protocol != "file" and protocol not in _PACKAGES):
        raise SettingError(
            f"{address}: only local paths, {', '.join(f'{name}://' for name in _PACKAGES)} and file:// "
            "are allowed, and no '::'."
        )


def normalized(address: str) -> str:
    """An address of a file or folder: absolute, without a slash at the end."""
    return address.rstrip("/") if is_remote(address) else _local(address)


def _local(address: str) -> str:
    path: str = LocalFileSystem._strip_protocol(address)
    return path


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn errors of any storage in the body into one sentence.

    Raises
    ------
    OutputError
        If a name is too long for the disk.
    SettingError
        If the body raises anything else but a :class:`DA3Error`.
    """
    try:
        yield
    except DA3Error:
        raise
    except ImportError:
        protocol = address.partition("://")[0]
        package = _PACKAGES.get(protocol, "the package of fsspec for it")
        raise SettingError(f"{address}: {protocol}:// needs {package}: pip install {package}.") from None
    except FileNotFoundError:
        what = "bucket, folder or file" if is_remote(address) else "file or folder"
        raise SettingError(f"{address}: no such {what}.") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise OutputError(f"{address}: the name is longer than the disk accepts.") from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SettingError(f"{address}: {str(reason).rstrip('.')}.") from None


def file_system(address: str) -> Any:
    """The fsspec file system of an address, which keeps no listings.

    Its class depends on the protocol alone, so names of files cannot choose another one.
    """
    if not is_remote(address):
        return LocalFileSystem()
    protocol = address.partition("://")[0]
    if protocol not in _PACKAGES:
        check_allowed(address)
    return fsspec.filesystem(protocol, use_listings_cache=False)


def open_file(address: str, compression: str | None = None) -> IO[bytes]:
    """Open a file for reading, decompressed if ``compression`` names a method, or is ``infer``."""
    stream: IO[bytes] = file_system(address).open(address, "rb", compression=compression)
    return stream


def read_file(address: str) -> bytes:
    """Content of a file; raises as :func:`explained`."""
    with explained(address):
        if not is_remote(address):
            return Path(_local(address)).read_bytes()
        data: bytes = file_system(address).cat_file(address)
        return data


def read_image(address: str, max_bytes: int, size: int | None = None) -> bytes:
    """Content of a regular file, whose size is checked before anything is read.

    Parameters
    ----------
    max_bytes : int
        Largest size in bytes.
    size : int | None
        Size of a file in a bucket, in bytes, if it is known.

    Raises
    ------
    ImageTooLargeError
        If the file is larger.
    SettingError
        If it is no regular file, such as a device; and as :func:`explained`.
    """
    with explained(address):
        if is_remote(address):
            if size is None:
                info = file_system(address).info(address)
                is_file, size = info["type"] == "file", info["size"]
            else:
                is_file = True
        else:
            found = os.stat(_local(address))  # noqa: PTH116
            is_file, size = stat.S_ISREG(found.st_mode), found.st_size
        if not is_file or size is None:
            raise SettingError(f"{address} is not a regular file.")
        if size > max_bytes:
            raise ImageTooLargeError(
                f"{address} has {size} bytes; the limit is {max_bytes} (MAX_IMAGE_BYTES)."
            )
        return read_file(address)


@dataclass(frozen=True)
class Place:
    """A folder on a disk or in a bucket.

    Its methods take paths below it, and raise as :func:`explained`.

    Parameters
    ----------
    address : str
        As :func:`normalized` returns it.
    """

    address: str

    @property
    def path(self) -> Path | None:
        """The folder; None if it is in a bucket."""
        return None if is_remote(self.address) else Path(self.address)

    def at(self, name: str) -> str:
        """Address of a file below it."""
        return f"{self.address}/{name}"

    def names(self, below: str = "") -> set[str]:
        """Paths of all files in a folder below it and the folders below that; empty if there is none."""
        folder = self.at(below).rstrip("/")
        with explained(folder):
            fs = file_system(folder)
            if not fs.exists(folder):
                return set()
            start = len(fs._strip_protocol(self.address)) + 1
            return {name[start:] for name in fs.find(folder)}

    def direct_names(self) -> set[str]:
        """Names of the files and folders directly in it; empty if it does not exist."""
        with explained(self.address):
            fs = file_system(self.address)
            if not fs.exists(self.address):
                return set()
            found = fs.ls(self.address, detail=False)
            return {name.rstrip("/").rpartition("/")[2] for name in found}

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return read_file(self.at(name))

    def write(self, name: str, data: bytes, scratch: Path | None = None) -> None:
        """Write a file; a reader finds all of it or nothing.

        Parameters
        ----------
        scratch : Path | None
            Folder on the same disk for the incomplete file; None for the file's own.
        """
        with explained(self.at(name)):
            if self.path is None:
                file_system(self.address).pipe_file(self.at(name), data)
                return
            file = self.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, data, scratch)

    @contextmanager
    def writing(self, names: list[str], scratch: str) -> Iterator[list[Path]]:
        """Write several files, which appear complete, in their order, after the body has ended.

        Parameters
        ----------
        scratch : str
            A folder below this one, for incomplete files on its disk.

        Yields
        ------
        list[Path]
            The files to write instead.
        """
        folder = self.path and self.path / scratch
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            paths = [Path(temporary, str(index)) for index in range(len(names))]
            yield paths
            for name, path in zip(names, paths, strict=True):
                with explained(self.at(name)):
                    if self.path is None:
                        file_system(self.address).put_file(str(path), self.at(name))
                        continue
                    target = self.path / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(target)

    def remove(self, below: str) -> None:
        """Remove a folder below it with all files, if it exists."""
        folder = self.at(below)
        with explained(folder):
            fs = file_system(folder)
            if fs.exists(folder):
                fs.rm(folder, recursive=True)
