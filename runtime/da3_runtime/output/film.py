"""Frames -> film files: a preview that plays everywhere, and depth without loss.

Both keep the frames' times, and neither depends on when or where it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import OutputError

LEVELS = 65535
# Without it, Matroska files get a random number.
_MUXER = {"fflags": "+bitexact"}
_BT709 = 1  # color space, primaries and transfer of HD films (ITU-T H.273)
_LIMITED = 1  # color range of films, 16 to 235


class _Kind(NamedTuple):
    """How a film file is encoded."""

    container: str
    codec: str
    pixels: str
    threads: int
    options: dict[str, str]


# Without B-frames (bf), whose order of decoding would make the file's duration wrong where times vary.
# On one thread and without mbtree, so that the same frames always give the same file: with mbtree, one
# in about a hundred files of x264 165 was another one (width 168 or 176; of 400 without it, none was).
_PREVIEW = _Kind(
    "mp4",
    "libx264",
    "yuv420p",
    1,
    {"crf": "18", "preset": "veryfast", "bf": "0", "x264-params": "mbtree=0"},
)
# Every frame alone (g), with a checksum for each of its parts (slicecrc).
_DEPTH = _Kind(
    "matroska", "ffv1", "gray16le", 4, {"level": "3", "g": "1", "slices": "4", "slicecrc": "1"}
)


class FilmWriter:
    """Writes one film file, frame by frame. Use it in a ``with`` statement.

    Parameters
    ----------
    path : Path
        The file.
    width, height : int
        Size of the frames.
    time_base : Fraction
        Seconds of one unit of time.
    rate : Fraction
        Frames per second on average, which only tells encoders what to expect.
    facts : Mapping[str, str]
        Texts that the file carries.

    Raises
    ------
    OutputError
        If FFmpeg cannot encode such a film here, or the file cannot be written.
    """

    _kind: _Kind

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        time_base: Fraction,
        rate: Fraction,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        import av

        kind = self._kind
        try:
            self._container = av.open(str(path), "w", format=kind.container, options=dict(_MUXER))
            stream: Any = self._container.add_stream(kind.codec, rate=rate)
        except (av.FFmpegError, ValueError) as error:
            raise OutputError(f"This PyAV cannot write {kind.codec} videos: {error}.") from None
        self._stream = stream
        stream.width, stream.height = self._padded(width, height)
        stream.pix_fmt, stream.options = kind.pixels, dict(kind.options)
        stream.time_base = stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = kind.threads
        self._container.metadata.update(facts or {})
        self._time_base = time_base

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def write(self, frame: NDArray[Any], time: int, duration: int) -> None:
        """Add a frame that is shown from ``time`` on, in units of the time base."""
        made = self._frame(frame)
        made.pts, made.time_base, made.duration = time, self._time_base, duration
        self._container.mux(self._stream.encode(made))

    def _padded(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def _frame(self, frame: NDArray[Any]) -> Any:
        raise NotImplementedError


class PreviewFilm(FilmWriter):
    """An H.264 film in MP4 of RGB frames [H, W, 3], uint8.

    H.264 wants even sides: an odd one gets one more column or row, a copy of the last one.
    """

    _kind = _PREVIEW

    def _padded(self, width: int, height: int) -> tuple[int, int]:
        return width + width % 2, height + height % 2

    def _frame(self, frame: NDArray[np.uint8]) -> Any:
        import av

        height, width = frame.shape[:2]
        padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        made = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24").reformat(
            format=self._kind.pixels, dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        context = self._stream.codec_context
        for each in (made, context):
            each.colorspace, each.color_range = _BT709, _LIMITED
            each.color_primaries = each.color_trc = _BT709
        return made


class DepthFilm(FilmWriter):
    """A lossless FFV1 film in Matroska of depth [H, W], float32, as 16-bit gray.

    A value times ``DEPTH_SCALE`` in the file's metadata is depth in ``UNIT``; 0 marks invalid pixels.

    Parameters
    ----------
    farthest : float
        Largest depth of the film, which becomes the largest value.
    unit : str
        Unit of the depth.
    """

    _kind = _DEPTH

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        time_base: Fraction,
        rate: Fraction,
        *,
        farthest: float,
        unit: str,
    ) -> None:
        self.scale = farthest / LEVELS if farthest > 0 else 1.0
        facts = {
            "DEPTH_SCALE": repr(self.scale),
            "UNIT": unit,
            "COMMENT": "depth = value * DEPTH_SCALE, in UNIT; 0 is invalid",
        }
        super().__init__(path, width, height, time_base, rate, facts)

    def _frame(self, frame: NDArray[np.float32]) -> Any:
        import av

        valid = np.isfinite(frame) & (frame > 0)
        # A positive depth below half a step stays valid.
        steps = np.clip(np.rint(np.where(valid, frame, 0) / np.float32(self.scale)), 1, LEVELS)
        return av.VideoFrame.from_ndarray(
            np.where(valid, steps, 0).astype(np.uint16), format=self._kind.pixels
        )
