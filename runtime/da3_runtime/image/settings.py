"""Settings of how an image comes in: its limits, and its download."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated, ClassVar

from pydantic.dataclasses import dataclass

from da3_runtime.util.setting_group import CONFIG, comma_separated, setting

_HOST = r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*"


@dataclass(frozen=True, config=CONFIG)
class ImageSettings:
    """Limits of one image."""

    title: ClassVar[str] = "Image limits"

    _: KW_ONLY
    max_image_pixels: int = setting(
        25_000_000,
        "Largest width times height of an image, in pixels. Default of the command depth and of the "
        "Python API: 100000000.",
        low=1,
        high=2**31,
    )
    max_image_bytes: int = setting(
        64 * 2**20,
        "Largest encoded image, in bytes. Default of the command depth and of the Python API: "
        "536870912.",
        low=1,
        high=2**31,
    )


# Defaults where the images are the user's own files, not those of strangers.
OWN_FILES = {"max_image_pixels": 100_000_000, "max_image_bytes": 512 * 2**20}


@dataclass(frozen=True, config=CONFIG)
class FilmSettings:
    """Limits of one film of a request. Its frames have the limit of pixels that images have."""

    title: ClassVar[str] = "Film limits"

    _: KW_ONLY
    max_video_bytes: int = setting(
        256 * 2**20, "Largest film of a request, in bytes.", low=1, high=2**34
    )
    max_video_seconds: int = setting(
        600,
        "Longest video of a request, in seconds of the video. At most 240 frames for each of these "
        "seconds are decoded, used or not.",
        low=1,
        high=86_400,
    )
    max_video_frames: int = setting(
        600,
        "How many frames of a film a request may use. A frame takes about 5 MB on the disk while the "
        "film is worked on, in WORKSPACE if it is set, else in the folder of temporary files.",
        low=1,
        high=1_000_000,
    )
    video_download_seconds: int = setting(
        120, "Longest download of a video_url, in seconds.", low=1, high=3600
    )


@dataclass(frozen=True, config=CONFIG)
class DownloadSettings:
    """How an ``image_url`` is downloaded."""

    title: ClassVar[str] = "Image downloads"

    _: KW_ONLY
    download_seconds: int = setting(10, "Longest download of an image_url, in seconds.", low=1, high=600)
    max_downloads: int = setting(
        32, "How many image_urls are downloaded at once; further ones get 503.", low=1, high=1000
    )
    image_url_hosts: Annotated[tuple[str, ...], comma_separated(_HOST)] = setting(
        (),
        "The only hosts that an image_url may name; *.name allows every host below a name. Unset: every "
        "public host.",
        takes="host names separated by commas",
    )
