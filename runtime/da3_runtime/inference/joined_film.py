"""The windows of a film -> one world: every frame's depth in one scale, and its camera."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_runtime.inference.estimator import Estimator
from da3_runtime.inference.windows import Window, WindowFiles, WindowOptions, run_window
from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Depth, Seen
from da3_runtime.postprocess.join import (
    IDENTITY,
    Join,
    Shared,
    between_cameras,
    composed,
    join_windows,
    moved_cameras,
)
from da3_runtime.postprocess.poses import Floats, Similarity, inverse
from da3_runtime.variants import Unit

# Pixels of the whole film from which percentiles are taken, however long it is.
_SAMPLE = 2**18
_SEED = 0
_LOOP = "loop"  # name of the window of the first and the last frames
# Joins beyond these are named in a warning: the depths of a pixel differ by more than this share, or
# less than this share of the pixels agrees.
_BAD_DEPTH, _FEW_INLIERS = 0.1, 0.5


class Sample(NamedTuple):
    """Depths of pixels from the whole film, and their confidence if the model predicts it, [N] each."""

    depth: NDArray[np.float32]
    confidence: NDArray[np.float32] | None


class Drift(NamedTuple):
    """How the two ends of a film disagree, by a window that sees both.

    Attributes
    ----------
    scale : float
        Scale at the film's end over the scale at its start; 1 is no drift.
    rotation : float
        Angle between the two in degrees.
    distance : float
        Distance between the last camera's center in the track and by that window, in the film's unit.
    """

    scale: float
    rotation: float
    distance: float


@dataclass(frozen=True, eq=False)
class JoinedFilm:
    """All windows of a film in one world, which is the first frame's camera.

    Attributes
    ----------
    files : WindowFiles
        The windows.
    step : int
        Frames from the start of a window to that of the next.
    times : list[int]
        Time of each frame in units of the film's time base.
    is_joined : bool
        Whether the windows share one world; else each frame stands alone.
    places : list[Similarity]
        From each window's world to the film's.
    joins : list[Join]
        Between each window and the one after it.
    unit : Unit
        Unit of depth and of the cameras' places.
    farthest : float
        Largest depth of the film.
    sample : Sample
        What percentiles over the film are taken from.
    warnings : list[str]
        Those of all windows, each once.
    drift : Drift | None
        How the film's ends disagree; None if that was not measured.
    """

    files: WindowFiles
    step: int
    times: list[int]
    is_joined: bool
    places: list[Similarity]
    joins: list[Join]
    unit: Unit
    farthest: float
    sample: Sample
    warnings: list[str]
    drift: Drift | None = None

    def frames(self) -> Iterator[tuple[int, Seen]]:
        """Time and depth of every frame in the film's world, at the network's size.

        Between two windows the frames that both have pass from one to the other: depths, confidences
        and the cameras' centers in a line, rotations along the least turn.
        """
        before: Window | None = None
        for index, window in enumerate(self._placed()):
            is_last = index + 1 == len(self.places)
            for at in range(len(window) if is_last else self.step):
                seen = window.seen(at)
                if before is not None and self.step + at < len(before):
                    share = (at + 1) / (len(before) - self.step + 1)
                    seen = _between(before.seen(self.step + at), seen, share)
                yield int(window.times[at]), seen
            before = window

    def _placed(self) -> Iterator[Window]:
        for window, place in zip(self.files, self.places, strict=True):
            yield _moved(window, place, self.unit) if self.is_joined else replace(window, unit=self.unit)


def joined_film(files: WindowFiles, options: WindowOptions, is_joined: bool) -> JoinedFilm:
    """Join the windows of a film; each is read once.

    Parameters
    ----------
    is_joined : bool
        Whether the windows overlap, as :meth:`WindowOptions.sees_several` says.
    """
    number = len(files)
    step = options.window - options.overlap if is_joined else options.window
    count = (number - 1) * step + len(files.load(number - 1))
    places, joins, units, sampled = [IDENTITY], list[Join](), set[Unit](), list[Sample]()
    warnings: dict[str, None] = {}
    times: list[int] = []
    farthest = 0.0
    before: Window | None = None
    for index, window in enumerate(files):
        units.add(window.unit)
        warnings |= dict.fromkeys(window.warnings)
        if is_joined and before is None:
            assert window.extrinsics is not None
            first = window.extrinsics[0].astype(np.float64)
            places = [Similarity(first[:, :3], first[:, 3], 1.0)]
        elif is_joined and before is not None:
            shared = len(before) - step
            join = join_windows(_shared(before, slice(step, None)), _shared(window, slice(0, shared)))
            joins.append(join)
            places.append(composed(places[-1], join.similarity))
        elif before is not None:
            places.append(IDENTITY)
        scale = places[-1].scale
        farthest = max(farthest, float(window.depth.max()) * scale)
        own = len(window) if index + 1 == number else step
        times += window.times[:own].tolist()
        sampled += _sampled(window, own, index * step, count, scale)
        before = window
    unit = units.pop() if len(units) == 1 else Unit.RELATIVE
    factor = 1.0
    if unit is Unit.METERS and is_joined:
        # Each window has meters of its own: their median is surer than the first window's.
        factor = 1 / float(np.median([place.scale for place in places]))
        places = [composed(Similarity(np.eye(3), np.zeros(3), factor), place) for place in places]
    confidence = [each.confidence for each in sampled if each.confidence is not None]
    sample = Sample(
        np.concatenate([each.depth for each in sampled]) * np.float32(factor),
        np.concatenate(confidence) if confidence else None,
    )
    bad = sum(join.depth_error > _BAD_DEPTH or 0 < join.inliers < _FEW_INLIERS for join in joins)
    texts = [*warnings]
    if bad:
        texts.append(
            f"{bad} of {len(joins)} joins between windows fit badly: scale and track may jump there."
        )
    if any(join.inliers == 0 for join in joins):
        texts.append("Some windows share only sky, so their cameras alone joined them.")
    return JoinedFilm(
        files, step, times, is_joined, places, joins, unit, farthest * factor, sample, texts
    )


def spread(most: int, frames: int) -> tuple[int, int]:
    """How many of at most ``most`` things each frame gets, and every how many-th frame gets any."""
    return max(1, most // frames), -(-frames // most)


def _shared(window: Window, frames: slice) -> Shared:
    assert window.intrinsics is not None
    assert window.extrinsics is not None
    weight = window.maps["confidence"][frames]
    if "sky" in window.maps:
        weight = np.where(window.maps["sky"][frames], np.float32(0), weight)
    return Shared(window.depth[frames], weight, window.intrinsics[frames], window.extrinsics[frames])


def _sampled(window: Window, own: int, first: int, count: int, scale: float) -> Iterator[Sample]:
    """Pixels of the first ``own`` frames of a window, so many that the film's sample stays bounded."""
    each, every = spread(_SAMPLE, count)
    for at in range(own):
        if (first + at) % every == 0:
            chosen = np.random.default_rng([_SEED, first + at]).integers(
                window.depth[at].size, size=each
            )
            confidence = window.maps.get("confidence")
            yield Sample(
                window.depth[at].ravel()[chosen] * np.float32(scale),
                None if confidence is None else confidence[at].ravel()[chosen],
            )


def _moved(window: Window, place: Similarity, unit: Unit) -> Window:
    """A window in the world that ``place`` leads to."""
    assert window.extrinsics is not None
    return replace(
        window,
        depth=window.depth * np.float32(place.scale),
        extrinsics=moved_cameras(window.extrinsics, place),
        unit=unit,
    )


def _between(one: Seen, other: Seen, share: float) -> Seen:
    """What is ``share`` of the way from one window's result for a frame to another's."""

    def mixed(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        if a.dtype == np.bool_:
            return a if share < 0.5 else b
        return np.asarray(cv2.addWeighted(a, 1 - share, b, share, 0))

    a, b = one.model, other.model
    assert a.camera is not None
    assert b.camera is not None
    camera = Camera(
        mixed(a.camera.intrinsics, b.camera.intrinsics),
        between_cameras(_double(a.camera.extrinsics), _double(b.camera.extrinsics), share),
    )
    model = replace(
        b,
        depth=Depth(mixed(a.depth.values, b.depth.values), b.depth.unit),
        camera=camera,
        maps={name: mixed(values, b.maps[name]) for name, values in a.maps.items()},
    )
    return replace(other, model=model)


def _double(values: NDArray[np.floating]) -> Floats:
    return values.astype(np.float64)


def run_loop(estimator: Estimator, files: WindowFiles, options: WindowOptions) -> None:
    """Run the first and the last frames of a film as one window and write it, unless it is there."""
    if files.has(_LOOP):
        return
    first, last = files.load(0), files.load(len(files) - 1)
    frames = _loop_frames(first, last, options)
    prepared = [window.prepared(at) for window, at in frames]
    times = [int(window.times[at]) for window, at in frames]
    files.save(_LOOP, run_window(estimator, prepared, times, options))


def _loop_frames(first: Window, last: Window, options: WindowOptions) -> list[tuple[Window, int]]:
    count = min(options.overlap, len(first), len(last))
    return [
        *((first, at) for at in range(count)),
        *((last, len(last) - count + at) for at in range(count)),
    ]


def with_drift(film: JoinedFilm) -> JoinedFilm:
    """The film with its drift, from the window that :func:`run_loop` wrote; the same without one."""
    if not film.is_joined or not film.files.has(_LOOP):
        return film
    loop = film.files.load(_LOOP)
    half = len(loop) // 2
    first, last = film.files.load(0), film.files.load(len(film.files) - 1)
    at_start = join_windows(_shared(first, slice(0, half)), _shared(loop, slice(0, half)))
    at_end = join_windows(_shared(last, slice(len(last) - half, None)), _shared(loop, slice(half, None)))
    by_start = composed(film.places[0], at_start.similarity)
    by_end = composed(film.places[-1], at_end.similarity)
    cosine = (np.trace(by_end.rotation.T @ by_start.rotation) - 1) / 2
    assert loop.extrinsics is not None
    assert last.extrinsics is not None
    expected = inverse(moved_cameras(loop.extrinsics[-1:], by_start))[0, :, 3]
    found = inverse(moved_cameras(last.extrinsics[-1:], film.places[-1]))[0, :, 3]
    drift = Drift(
        by_end.scale / by_start.scale,
        math.degrees(math.acos(min(max(float(cosine), -1.0), 1.0))),
        float(np.linalg.norm(found - expected)),
    )
    return replace(film, drift=drift)
