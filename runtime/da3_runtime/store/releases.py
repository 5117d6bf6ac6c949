"""The published checkpoints of the hub: which commit is downloaded, and how a file is recognized.

Sizes and digests are those that several public projects pin; tests derive each size from the network.
"""

from __future__ import annotations

from dataclasses import dataclass

from da3_runtime.errors import CheckpointError

UNKNOWN = "not a known release"
NESTED = "nested"  # value of WEIGHTS: a network of the nested model's checkpoint
_FILES = ("hub", NESTED, "local")  # sources of weights that may be a release
_SHORT = 8  # digits of a commit in a name


@dataclass(frozen=True)
class Release:
    """A published ``model.safetensors``.

    Attributes
    ----------
    repo, revision : str
        Hub repository and commit.
    size : int
        Size in bytes.
    sha256, config_sha256 : str
        Digests of the file, and of the ``config.json`` beside it, in hexadecimal. The second is empty
        where it is not known.
    """

    repo: str
    revision: str
    size: int
    sha256: str
    config_sha256: str = ""

    @property
    def name(self) -> str:
        """The release in words."""
        return f"{self.repo.rpartition('/')[2]} as published (commit {self.revision[:_SHORT]})"


# The digest of DA3MONO-LARGE is not known. DA3-GIANT is the same file as DA3-GIANT-1.1.
RELEASES = (
    Release(
        "depth-anything/DA3-SMALL",
        "e08cab65ca0ec38e7826075418411ab90cab4da3",
        137_248_940,
        "364492e38a3a06d221ac75da7f6621ada3f2361cd24fde11ba79091e9f40efcf",
        "a486e29e82b7ab4a7d4cefc1ea4526cfe2ae438a572c8ca98917cfbcde7447d2",
    ),
    Release(
        "depth-anything/DA3-BASE",
        "f4a6c9b3c95e41c82048423d3493a81ec3fa810e",
        541_518_028,
        "e01067dc1659613083d9145a9a2547ccdbe6ccbbf83c4fe7b3e8a4e2bdae78b5",
        "5e34115ebc17bd2d8d43033c5f72e9446ac8833fd61d3fa160b7e67e0bb5b7b5",
    ),
    Release(
        "depth-anything/DA3-LARGE-1.1",
        "0e109ae307c5982f319a67cf6f9f99ccdc0ec97c",
        1_643_843_860,
        "739905c423cf0d6ccaf9e61a8401d82ba1ac32d7f4d3ee6dca8f92b377633f64",
        "744dcaf53859490ed92fc6cb98d68d3daf624b8c54533aaf604bdb53f06321f5",
    ),
    Release(
        "depth-anything/DA3-GIANT-1.1",
        "72ee9f89ce4e50d704e9d55ee9c646ec8dc25a19",
        5_422_814_644,
        "1e47a08338ca73a6d6a21d37fd060b26b993b672bc6ddf6295fe474df2592001",
        "74626a50d6dee2a11820291a4305c1a34aa5adc4f7260908bbdbc9a939ba8e93",
    ),
    Release(
        "depth-anything/DA3METRIC-LARGE",
        "4010e39f3634a45bc60553321fb49fb760bd594e",
        1_336_734_448,
        "bbea5b0b3ee389849cffa7ddae89de064a90abd2b055fc5aa99aac68db324776",
        "a336f3e76fe375aaae17a9aed9130c9f2aa061535d317ec57dcb2f1f02e1dd53",
    ),
    Release(
        "depth-anything/DA3NESTED-GIANT-LARGE-1.1",
        "b2359bdf726fb44ef62acca04d629dcf158053e7",
        6_759_558_100,
        "8ebe871a022ed58d2fc8fdfb2ebdb31d57b60fe39611c849095851a7b7c6020c",
        "09adf89474017e717bc05aa86fd3a378708ba8914b036d61874eced328069468",
    ),
    Release(
        "depth-anything/DA3NESTED-GIANT-LARGE",
        "8615eefb62f2db4f8d6ebaa59160086981672829",
        6_759_558_100,
        "8899faf998dedbc230261ab736fa57015280727399429122d44d4f9e7aac2ddd",
    ),
)
_BY_REPO = {release.repo: release for release in RELEASES}
_BY_DIGEST = {release.sha256: release for release in RELEASES}


def pinned_revision(repo: str) -> str | None:
    """The commit of a repository that is downloaded by default; None takes the default branch."""
    release = _BY_REPO.get(repo)
    return release.revision if release else None


def weights_name(weights: str, sha256: str) -> str:
    """What weights are, in words: a published release, ``bundled``, ``random:SEED`` or none of these.

    Parameters
    ----------
    weights, sha256 : str
        Source and digest, as in a manifest.
    """
    release = _BY_DIGEST.get(sha256)
    if release is not None:
        return release.name
    return UNKNOWN if weights in _FILES else weights


def check_release(repo: str | None, commit: str | None, sha256: str) -> None:
    """Check the digest of a file that was downloaded from a pinned commit; others are not checked.

    Raises
    ------
    CheckpointError
        If the file is not the published one.
    """
    release = _BY_REPO.get(repo or "")
    if release is not None and commit == release.revision and sha256 != release.sha256:
        raise CheckpointError(
            f"The checkpoint of {release.repo} is not the published file: its SHA-256 starts with "
            f"{sha256[:_SHORT]} instead of {release.sha256[:_SHORT]}. Delete it from the hub's cache; "
            "then it is downloaded again."
        )
