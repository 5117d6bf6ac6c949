"""Runs a model on a film in windows of frames, and keeps each window's result in a file.

A model that sees several frames at once gets windows that overlap; one that sees each frame alone gets
them one after another. A finished window is written atomically and never computed again, so that a run
that was killed goes on with the window that it was in.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import SceneTooLargeError, SettingError
from da3_runtime.image.decode import Photo
from da3_runtime.image.film import Film, Pick
from da3_runtime.inference.estimator import Estimator, Prepared, Timings
from da3_runtime.network_io import MAPS, MOST_VIEWS
from da3_runtime.postprocess.camera import Camera, given_lens
from da3_runtime.postprocess.depth import Depth, Prediction, Seen
from da3_runtime.util.files import write_atomically
from da3_runtime.variants import Series, Unit, Variant

_MOST_WARNINGS = 100  # that are kept of a film


def default_overlap(window: int) -> int:
    """How many frames a window shares with the next one, unless that is chosen."""
    return min(3, window // 2)


@dataclass(frozen=True)
class WindowOptions:
    """How a film is cut into windows.

    Attributes
    ----------
    pick : Pick
        Which frames are used.
    window : int
        Frames of a window.
    overlap : int
        How many of them the next window has too, at most half.
    focal_length_px : float | None
        Focal length in pixels of the upright film, if known.
    loop : bool
        Whether the first and the last frames are run as one more window, to measure drift.
    processing_res : int | None
        Longest side of the model's input in pixels; None for the estimator's own.
    """

    pick: Pick = field(default_factory=Pick)
    window: int = 8
    overlap: int = 3
    focal_length_px: float | None = None
    loop: bool = False
    processing_res: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises
        ------
        SettingError
            If a number is outside its range.
        """
        if not 1 <= self.window <= MOST_VIEWS:
            raise SettingError(f"window must be from 1 to {MOST_VIEWS}, not {self.window}.")
        if self.window > 1 and not 1 <= self.overlap <= self.window // 2:
            raise SettingError(
                f"overlap must be from 1 to half of the window of {self.window} frames, not "
                f"{self.overlap}."
            )

    def sees_several(self, variant: Variant) -> bool:
        """Whether the model sees the frames of a window together, so that windows can be joined."""
        return self.window > 1 and variant.graphs[0].series is Series.ANYVIEW


@dataclass(frozen=True, eq=False)
class Window:
    """What the network saw and returned for some frames of a film, at its own size.

    Attributes
    ----------
    times : NDArray[np.int64]
        [S], time of each frame in units of the film's time base.
    images : NDArray[np.uint8]
        [S, h, w, 3], RGB.
    depth : NDArray[np.float32]
        [S, h, w].
    maps : dict[str, NDArray]
        The maps that the model predicts, [S, h, w].
    intrinsics, extrinsics : NDArray[np.floating] | None
        [S, 3, 3] in pixels of ``images``, and [S, 3, 4] in the window's own world; None if unknown.
    unit : Unit
        Unit of the depth.
    focal_source : str | None
        As in :class:`Prediction`.
    warnings : list[str]
        Sentences about its frames, each once.
    width, height : int
        Size of the upright film in pixels.
    """

    times: NDArray[np.int64]
    images: NDArray[np.uint8]
    depth: NDArray[np.float32]
    maps: dict[str, NDArray[Any]]
    intrinsics: NDArray[np.floating] | None
    extrinsics: NDArray[np.floating] | None
    unit: Unit
    focal_source: str | None
    warnings: list[str]
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.times)

    def seen(self, index: int) -> Seen:
        """One frame as the network saw it."""
        camera = None
        if self.intrinsics is not None and self.extrinsics is not None:
            camera = Camera(self.intrinsics[index], self.extrinsics[index])
        maps = {name: values[index] for name, values in self.maps.items()}
        model = Prediction(Depth(self.depth[index], self.unit), camera, maps, self.focal_source, [])
        image = self.images[index]
        scale = self.width / image.shape[1], self.height / image.shape[0]
        return Seen(image, model, self.width, self.height, 0, 0, scale)

    def prepared(self, index: int) -> Prepared:
        """One frame's network input."""
        return Prepared(self.images[index][None, None], self.width, self.height, None, [])


class WindowFiles:
    """The windows of a film in a folder, one file each.

    Parameters
    ----------
    folder : Path
        The folder; the first window creates it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __len__(self) -> int:
        """Number of windows that are there without a gap."""
        names = {path.name for path in self._folder.glob("*.npz")}
        count = 0
        while self._path(count).name in names:
            count += 1
        return count

    def save(self, index: int | str, window: Window) -> None:
        """Write a window; a name instead of a number is a window apart from the film's order."""
        arrays: dict[str, Any] = {"times": window.times, "images": window.images, "depth": window.depth}
        arrays |= {f"map_{name}": values for name, values in window.maps.items()}
        if window.intrinsics is not None and window.extrinsics is not None:
            arrays |= {"intrinsics": window.intrinsics, "extrinsics": window.extrinsics}
        facts = {
            name: getattr(window, name)
            for name in ("unit", "focal_source", "warnings", "width", "height")
        }
        stream = io.BytesIO()
        np.savez(stream, facts=np.array(json.dumps(facts)), **arrays)
        self._folder.mkdir(exist_ok=True)
        write_atomically(self._path(index), stream.getvalue())

    def has(self, name: str) -> bool:
        """Whether a window apart was written."""
        return self._path(name).exists()

    def load(self, index: int | str) -> Window:
        """Read a window."""
        with np.load(self._path(index), allow_pickle=False) as file:
            arrays = dict(file)
        facts = json.loads(str(arrays.pop("facts")))
        maps = {
            name.removeprefix("map_"): arrays.pop(name) for name in [*arrays] if name.startswith("map_")
        }
        facts["unit"] = Unit(facts["unit"])
        cameras = {name: arrays.pop(name, None) for name in ("intrinsics", "extrinsics")}
        return Window(**arrays, maps=maps, **cameras, **facts)

    def __iter__(self) -> Iterator[Window]:
        for index in range(len(self)):
            yield self.load(index)

    def _path(self, index: int | str) -> Path:
        return self._folder / f"{index if isinstance(index, str) else f'{index:06d}'}.npz"


def run_windows(
    estimator: Estimator,
    film: Film,
    files: WindowFiles,
    options: WindowOptions,
    progress: Callable[[int], object],
) -> None:
    """Run the model on the windows of a film that are not in ``files`` yet, and write them there.

    Parameters
    ----------
    progress : Callable[[int], object]
        Called with the number of frames that are done, also while frames are skipped.

    Raises
    ------
    ImageError
        As :meth:`Film.frames`.
    SceneTooLargeError
        If the backend cannot run so many frames at once.
    InferenceError
        If the backend fails.
    """
    is_joined = options.sees_several(estimator.loaded.folder.variant)
    overlap = options.overlap if is_joined else 0
    step = options.window - overlap
    done = len(files)
    times: list[int] = []
    frames: list[Prepared] = []

    def run() -> None:
        nonlocal done
        files.save(done, run_window(estimator, frames, times, options))
        done += 1
        del times[:step], frames[:step]

    progress(done * step)
    for frame in film.frames(options.pick, done * step, lambda: progress(done * step)):
        times.append(frame.time)
        # The network's input, as a few full frames of a large film would take gigabytes.
        photo = Photo(frame.rgb, None)
        frames.append(estimator.prepare(photo, Timings(), options.processing_res))
        if len(frames) == options.window:
            run()
            progress(done * step)
    if len(frames) > (overlap if done else 0):
        run()


def run_window(
    estimator: Estimator, frames: list[Prepared], times: list[int], options: WindowOptions
) -> Window:
    """Run the model on a window; raises as :func:`run_windows`."""
    loaded, (_, width, height, _, _) = estimator.loaded, frames[0]
    focal = options.focal_length_px
    if options.sees_several(loaded.folder.variant):
        lens = given_lens(width, height, focal)
        try:
            scene = estimator.estimate_scene(
                frames, Timings(), lenses=[lens] * len(frames), model_size=True
            )
        except SceneTooLargeError:
            _, _, rows, columns, _ = frames[0].images.shape
            raise SceneTooLargeError(
                f"{loaded.backend.name} cannot run {len(frames)} frames of {columns} x {rows} pixels at "
                "once: choose a smaller window or processing_res."
            ) from None
        predictions = [view.prediction for view in scene.views]
    else:
        clocks = [Timings() for _ in frames]
        predictions = estimator.estimate_all(
            [lambda frame=frame: frame for frame in frames],  # type: ignore[misc]
            clocks,
            focal_length_px=focal,
            model_size=True,
        )
    models = [each.seen.model for each in predictions if each.seen is not None]
    cameras = [each.camera for each in models if each.camera is not None]
    warnings = dict.fromkeys(text for each in predictions for text in each.warnings)
    units = {each.depth.unit for each in models}
    first = models[0]
    return Window(
        np.array(times, dtype=np.int64),
        np.stack([each.images[0, 0] for each in frames]),
        np.stack([each.depth.values for each in models]),
        {name: np.stack([each.maps[name] for each in models]) for name in MAPS if name in first.maps},
        np.stack([camera.intrinsics for camera in cameras]) if cameras else None,
        np.stack([camera.extrinsics for camera in cameras]) if cameras else None,
        units.pop() if len(units) == 1 else Unit.RELATIVE,
        first.focal_source,
        [*warnings][:_MOST_WARNINGS],
        width,
        height,
    )
