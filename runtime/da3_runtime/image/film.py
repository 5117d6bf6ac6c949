"""Film file -> upright RGB frames with their times, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import ImageError, ImageFormatError, ImageTooLargeError

if TYPE_CHECKING:
    from av import VideoFrame

# FFmpeg also "plays" text, playlists and lists of other files. No other format ever gets a file, and no
# film may name another file or an address. Sound is in the list so that its refusal can say so.
_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,mxf,gif,"
    "mp3,wav,flac",
    "protocol_whitelist": "file",
}
_USUAL_RATE = Fraction(25)  # of a film that does not state its own
_ROUNDING = 0.0006  # seconds; Matroska rounds times to milliseconds
# A film counts as cut short if it ends so many seconds before the time in its header: that of its
# pictures, or that of the file, whose sound may be longer.
_CUT_SHORT, _CUT_SHORT_FILE = 0.5, 2.0


class Pick(NamedTuple):
    """Which frames of a film are used.

    Attributes
    ----------
    every : int
        Every n-th frame; 1 for all.
    fps : float | None
        Instead of ``every``: at most so many frames per second. A frame is never used twice.
    """

    every: int = 1
    fps: float | None = None


class FilmFrame(NamedTuple):
    """One used frame of a film.

    Attributes
    ----------
    number : int
        Its place among the used frames, from 0.
    time : int
        Time since the film's first frame, in units of :attr:`Film.time_base`.
    rgb : NDArray[np.uint8]
        [H, W, 3], as a player shows it: upright, with square pixels.
    """

    number: int
    time: int
    rgb: NDArray[np.uint8]


class FilmLimits(NamedTuple):
    """What a film may have; None is no limit.

    Attributes
    ----------
    pixels : int
        Largest width times height of a frame.
    seconds : int | None
        Longest duration.
    frames : int | None
        Largest number of used frames.
    frames_per_second : int | None
        With ``seconds``: so many frames of each second are decoded at most, used or not.
    """

    pixels: int
    seconds: int | None = None
    frames: int | None = None
    frames_per_second: int | None = None


class Film:
    """A film file that is read once, from its start. Use it in a ``with`` statement.

    Parameters
    ----------
    path : Path
        The file.
    limits : FilmLimits
        What a film may have.
    name : str | None
        How messages call the film; None for its path.

    Attributes
    ----------
    time_base : Fraction
        Seconds of one unit of time.
    rate : Fraction
        Frames per second on average, as the film states it.
    seconds : float | None
        Duration that the film's header states.
    warnings : list[str]
        Sentences about damage; complete once all frames were read.

    Raises
    ------
    ImageFormatError
        If the file is no film, or has no pictures.
    ImageTooLargeError
        If its frames have more pixels than allowed, or its header states too many seconds.
    ImageError
        If the file cannot be read.
    """

    def __init__(self, path: Path, limits: FilmLimits, name: str | None = None) -> None:
        import av

        self._name, self._limits = name or str(path), limits
        try:
            if path.is_dir():
                raise ImageError(f"{self._name} is a folder: choose a video.")
            # The prefix keeps a name such as "http:x" from being taken for an address.
            self._container = av.open(f"file:{path}", options=dict(_OPTIONS))
        except (av.FFmpegError, OSError) as error:
            raise self._refusal(error) from None
        films = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not films:
            self._container.close()
            raise ImageFormatError(f"{self._name} has no video stream, only audio: send a video.")
        self._stream = stream = films[0]
        stream.thread_type = "AUTO"
        # A frame may be larger than the header says. Decoders round sides up, so this is no exact limit.
        stream.codec_context.options = {"max_pixels": str(2 * limits.pixels)}
        self.warnings: list[str] = []
        self.time_base = stream.time_base or Fraction(1, 90_000)
        self.rate = stream.average_rate or stream.guessed_rate or _USUAL_RATE
        length = self._container.duration
        self.seconds: float | None = length / av.time_base if length else None
        self._slack, self._is_damaged = _CUT_SHORT_FILE, False
        if stream.duration:
            self.seconds, self._slack = float(stream.duration * self.time_base), _CUT_SHORT
        try:
            self._check_pixels(stream.codec_context.width * stream.codec_context.height)
            self._check_seconds(self.seconds or 0)
        except ImageError:
            self._container.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def frames(
        self, pick: Pick, start: int = 0, on_skip: Callable[[], object] = lambda: None
    ) -> Iterator[FilmFrame]:
        """The used frames from number ``start`` on; those before are decoded and not converted.

        A damaged film gives the frames before the damage, and a warning. All frames have the size of the
        first one, to which others are scaled.

        Parameters
        ----------
        on_skip : Callable[[], object]
            Called for each decoded frame that is left out; an error that it raises ends the reading.

        Raises
        ------
        ImageTooLargeError
            If a frame has too many pixels, or the video too many frames or seconds.
        ImageError
            If not a single frame can be decoded.
        """
        number, size, time, due = 0, None, -1, 0.0
        period = 1 / pick.fps if pick.fps else 0.0
        for index, (time, frame) in enumerate(self._timed()):
            seconds = float(time * self.time_base)
            self._check_seconds(seconds)
            self._check_decoded(index + 1)
            if index % pick.every or seconds < due - min(_ROUNDING, period / 4):
                on_skip()
                continue
            # After a gap, frames are not used faster to make up for it.
            due = max(due + period, seconds + period / 2)
            self._check_pixels(frame.width * frame.height)
            if self._limits.frames is not None and number >= self._limits.frames:
                raise ImageTooLargeError(
                    f"{self._name} has more than {self._limits.frames} frames that would be used "
                    "(MAX_VIDEO_FRAMES): use fewer, by fps or every."
                )
            size = size or self._square_size(frame)
            # A header may claim pixels of any shape.
            self._check_pixels(size[0] * size[1])
            if number >= start:
                yield FilmFrame(number, time, _upright(frame, size))
            else:
                on_skip()
            number += 1
        if time < 0:
            raise ImageError(f"{self._name} has no frame that can be decoded: send the whole video.")
        self._check_end(float(time * self.time_base + 1 / self.rate))

    def _timed(self) -> Iterator[tuple[int, VideoFrame]]:
        """Every frame with its time since the first; times always grow.

        A frame whose time is missing, or not after the one before, comes one frame's duration later.
        """
        usual = max(1, round(1 / self.rate / self.time_base))
        first: int | None = None
        time = -usual
        for frame in self._decoded():
            stated = frame.pts
            if first is None:
                first = stated or 0
            known = None if stated is None else stated - first
            time = known if known is not None and known > time else time + usual
            yield time, frame

    def _decoded(self) -> Iterator[VideoFrame]:
        """Every frame up to the end, or to the first damage."""
        import av

        try:
            for packet in self._container.demux(self._stream):
                yield from packet.decode()
        except (av.FFmpegError, OSError):
            self._is_damaged = True
            try:
                # The frames before the damage that the decoder still holds.
                yield from self._stream.codec_context.decode(None)
            except (av.FFmpegError, OSError):
                return

    def _check_end(self, end: float) -> None:
        if self._is_damaged:
            self.warnings.append(
                f"The video is damaged at {end:.1f} s: only the frames before are used."
            )
        elif self.seconds and end < self.seconds - self._slack - 2 / self.rate:
            self.warnings.append(
                f"The video ends at {end:.1f} s, and its header says {self.seconds:.1f} s: it may be "
                "cut short."
            )

    def _square_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height of a frame with square pixels, before its rotation."""
        aspect = self._stream.sample_aspect_ratio or 1
        return max(1, round(frame.width * aspect)), frame.height

    def _check_pixels(self, pixels: int) -> None:
        if pixels > self._limits.pixels:
            raise ImageTooLargeError(
                f"{self._name}: a frame has {pixels} pixels; the limit is {self._limits.pixels} "
                "(MAX_IMAGE_PIXELS)."
            )

    def _check_seconds(self, seconds: float) -> None:
        if self._limits.seconds is not None and seconds > self._limits.seconds:
            raise ImageTooLargeError(
                f"{self._name} is longer than {self._limits.seconds} seconds (MAX_VIDEO_SECONDS): send "
                "a part of it."
            )

    def _check_decoded(self, frames: int) -> None:
        seconds, rate = self._limits.seconds, self._limits.frames_per_second
        if seconds is not None and rate is not None and frames > seconds * rate:
            raise ImageTooLargeError(
                f"{self._name} has more than {seconds * rate} frames ({rate} for each of "
                "MAX_VIDEO_SECONDS): send a part of it."
            )

    def _refusal(self, error: Exception) -> ImageError:
        if isinstance(error, FileNotFoundError):
            return ImageError(f"{self._name}: no such file.")
        if isinstance(error, PermissionError | IsADirectoryError):
            return ImageError(f"{self._name}: {error.strerror}.")
        return ImageFormatError(
            f"{self._name} is not a video that can be read, or its end is missing: send a whole MP4, "
            "MOV, MKV, WebM, AVI, MPEG, FLV, Ogg, WMV, MXF or GIF file."
        )


def _upright(frame: VideoFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A frame at ``size`` as RGB, rotated and mirrored as its display matrix says.

    The matrix (a b u, c d v, x y w) shows the pixel (p, q) at (a p + c q, b p + d q): FFmpeg,
    libavutil/display.h. Other angles than multiples of 90 degrees count as the nearest one.
    """
    rgb: NDArray[np.uint8] = frame.reformat(*size, format="rgb24").to_ndarray()  # type: ignore[assignment]
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return rgb
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    across, down = a, d
    if abs(b) > abs(a):
        rgb, across, down = rgb.swapaxes(0, 1), c, b
    return np.ascontiguousarray(rgb[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])
