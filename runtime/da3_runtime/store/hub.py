"""Finds files of Hugging Face repositories in RunPod's mount, in the local cache, or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from da3_runtime.errors import ArtefactError, DA3Error

# Where RunPod mounts the models that it caches, in the layout of the hub's own cache.
CACHED_MODELS_DIR = Path("/runpod-volume/huggingface-cache/hub")


class HubError(DA3Error):
    """A file of a hub repository is not available.

    The message is the end of a sentence whose subject is the repository, such as "is gated ...".

    Attributes
    ----------
    is_missing : bool
        Whether the repository was reached and lacks the file.
    """

    status = 503
    exit_code = 2

    def __init__(self, reason: str, is_missing: bool = False) -> None:
        super().__init__(reason)
        self.is_missing = is_missing


def hub_file(
    repo: str, name: str, revision: str | None, mount: Path, default: str | None = None
) -> Path:
    """Path of a file of a repository; the file is downloaded if it is in neither cache.

    huggingface_hub reads ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and the variables of its cache. It moves a
    file into the cache only when the download is complete. The path ends in
    ``snapshots/<commit>/<name>``.

    Parameters
    ----------
    repo, name : str
        Repository, such as ``owner/name``, and the file's path in it.
    revision : str | None
        Branch, tag or commit; None for ``default``.
    mount : Path
        Cache of the same layout that is searched first and never written; it need not exist.
    default : str | None
        Commit that is downloaded if no revision is asked for; None for the default branch. A cache that
        has only another commit is used as it is.

    Raises
    ------
    HubError
        If the file is not available.
    """
    try:
        import httpx  # huggingface_hub's own transport
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.utils import logging
    except Exception as error:
        raise HubError("cannot be read, because huggingface_hub cannot be imported") from error

    # huggingface_hub warns at every retry, which would hide the one error that is reported.
    logging.set_verbosity_error()
    if (cached := _in_mount(repo, name, revision, mount, default)) is not None:
        return cached
    is_missing = False
    try:
        return Path(hf_hub_download(repo, name, revision=revision or default))
    except hub.GatedRepoError:
        reason = "is gated and HF_TOKEN has no access to it"
    except hub.RevisionNotFoundError:
        reason = f"has no revision {revision or default!r}"
    except hub.EntryNotFoundError as error:
        is_missing = not isinstance(error, hub.LocalEntryNotFoundError)
        other = None if is_missing or revision else try_to_load_from_cache(repo, name)
        if isinstance(other, str):
            return Path(other)
        reason = f"lacks {name}" if is_missing else "cannot be reached and is not in the cache"
    except hub.RepositoryNotFoundError:
        reason = "does not exist or HF_TOKEN has no access to it"
    except OSError as error:
        # The hub's own errors are OSErrors too.
        local = not isinstance(error, (hub.HfHubHTTPError, ConnectionError)) and error.errno
        reason = f"cannot be kept in the cache ({error.strerror})" if local else "cannot be reached"
    except (httpx.HTTPError, ValueError):
        reason = "cannot be reached"
    raise HubError(reason, is_missing)


def _in_mount(
    repo: str, name: str, revision: str | None, mount: Path, default: str | None
) -> Path | None:
    folder = mount / f"models--{repo.replace('/', '--')}"
    if not folder.is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    for wanted in (revision,) if revision is not None else (default, None):
        found = try_to_load_from_cache(repo, name, cache_dir=mount, revision=wanted)
        if isinstance(found, str):
            return Path(found)
    # A mount with a single commit may lack the file that maps a branch to it.
    snapshots = list(folder.glob(f"snapshots/*/{name}")) if revision is None else []
    return snapshots[0] if len(snapshots) == 1 else None


def parse_repo(text: str) -> tuple[str, str | None]:
    """Repository and revision of ``owner/name`` or ``owner/name@revision``."""
    repo, _, revision = text.partition("@")
    return repo, revision or None


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository at one commit; its files are downloaded when they are needed.

    Attributes
    ----------
    repo, revision : str
        Repository and commit.
    folder : PurePosixPath
        Path of the folder in the repository.
    mount : Path
        As for :func:`hub_file`.
    """

    repo: str
    revision: str
    folder: PurePosixPath
    mount: Path

    def fetch(self, names: Sequence[str]) -> None:
        """Download the files ``names`` of the folder, unless a cache has them.

        Raises
        ------
        ArtefactError
            If one of them is not available.
        """
        for name in names:
            try:
                hub_file(self.repo, str(self.folder / name), self.revision, self.mount)
            except HubError as error:
                raise ArtefactError(f"the hub repository {self.repo} {error}") from None
