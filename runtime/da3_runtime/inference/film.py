"""A film -> its depth: the model runs on windows, the windows are joined, and the results are written.

A run goes on after a kill at any moment. The work folder holds the settings of the run and every
finished window. Results are written there too, and move to the folder of the results at the end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import OutputError, SettingError
from da3_runtime.image.film import Film, FilmLimits
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.inference.joined_film import JoinedFilm, joined_film, run_loop, spread, with_drift
from da3_runtime.inference.windows import WindowFiles, WindowOptions, run_windows
from da3_runtime.output.colmap import colmap
from da3_runtime.output.encode import Output, Wanted
from da3_runtime.output.files import described_outputs
from da3_runtime.output.film import DepthFilm, PreviewFilm
from da3_runtime.output.glb import glb
from da3_runtime.output.ply import ply
from da3_runtime.output.preview import color_preview, levels_of
from da3_runtime.output.track import tum
from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Depth, Prediction, Seen, resize_prediction
from da3_runtime.postprocess.points import Cloud, cloud_of, joined_clouds
from da3_runtime.util.files import locked, sync, write_atomically
from da3_runtime.variants import Variant

JSON = dict[str, Any]
# Called with a stage, how many of its frames are done, and how many there are about; None if unknown.
Progress = Callable[[str, int, int | None], object]

WORK = ".da3-video"
SUMMARY, PREVIEW, DEPTH = "film.json", "preview.mp4", "depth.mkv"
FRAMES, JOINS, TRACK = "frames.jsonl", "joins.jsonl", "track.txt"
FRAME_FILES, STEM = "frames", "film"
OF_FILM = (Output.GLB, Output.PLY, Output.COLMAP)
_RESULTS = (
    PREVIEW,
    DEPTH,
    FRAMES,
    JOINS,
    TRACK,
    FRAME_FILES,
    *(f"{STEM}{output.row.ending}" for output in OF_FILM),
    SUMMARY,
)
_RUN, _ENGINE, _DONE = "run.json", "engine.json", "windows.json"
_LOCK = f"{WORK}.lock"
# Results are complete once their folder has the second name. What is left in it was not moved yet.
_WRITING, _PUBLISHING = "results", "publishing"
# Options whose names are not those of the values that a run keeps.
_OPTIONS = {
    "model_id": "--model",
    "confidence": "--points-confidence",
    "edge": "--points-edge",
    "sky": "--points-sky",
    "most": "--points-max",
    "cameras": "--no-points-cameras",
}
_MOST_CAMERAS = 256  # that a GLB file shows
_CLOUDS = 256  # frames whose points are joined at once


@dataclass(frozen=True)
class FilmRun:
    """What to make of a film.

    Attributes
    ----------
    film : Path
        The film.
    out : Path
        Folder of the results.
    options : WindowOptions
        How the film is cut into windows.
    wanted : Wanted
        Further files: those of each frame, and those of :data:`OF_FILM`.
    model_size : bool
        Whether films and maps have the size of the model's input.
    limits : FilmLimits
        What the film may have.
    engine : Mapping[str, object]
        The settings of the model by name, which a run that goes on must have too.
    variant : Variant
        The model.
    name : str | None
        How messages call the film; None for its path.
    """

    film: Path
    out: Path
    options: WindowOptions
    wanted: Wanted
    model_size: bool
    limits: FilmLimits
    engine: Mapping[str, object]
    variant: Variant
    name: str | None = None

    @property
    def is_joined(self) -> bool:
        """Whether the windows share one world."""
        return self.options.sees_several(self.variant)

    def opened(self) -> Film:
        """The film; raises as :class:`Film`."""
        return Film(self.film, self.limits, self.name)


class _Finished(NamedTuple):
    """Facts of a film whose windows are all there."""

    time_base: Fraction
    rate: Fraction
    model: JSON
    warnings: list[str]


def run_film(run: FilmRun, load: Callable[[], Estimator], progress: Progress, timings: Timings) -> JSON:
    """Write the results of a film, and return what is in its summary.

    Parameters
    ----------
    load : Callable[[], Estimator]
        Loads the model; called only if a window is missing.

    Raises
    ------
    SettingError
        If the folder holds another run, or something else; if an output cannot be made of this model.
    ImageError
        If the film cannot be read.
    InferenceError
        If the backend fails.
    """
    _check_outputs(run)
    # Nothing is written for a film that cannot be read.
    with run.opened():
        identity = _identity(run)
    if run.out.exists() and not run.out.is_dir():
        raise SettingError(f"--out {run.out}: it is a file; give a folder.")
    with _locked(run.out):
        work = run.out / WORK
        earlier = _read(run.out / SUMMARY)
        own = list[str]()
        if earlier is not None and earlier.get("run") == identity:
            if _is_complete(run.out, earlier):
                shutil.rmtree(work, ignore_errors=True)
                return earlier
            own = [SUMMARY, *earlier["files"]]
        publishing = work / _PUBLISHING
        _begin(run.out, work, identity, own)
        if not (publishing / SUMMARY).exists():
            files = WindowFiles(work / "windows")
            finished = _finish_windows(run, work, files, load, progress, timings)
            with timings.stage("join"):
                film = with_drift(joined_film(files, run.options, run.is_joined))
            with timings.stage("write"):
                results = work / _WRITING
                for folder in (results, publishing):
                    shutil.rmtree(folder, ignore_errors=True)
                results.mkdir()
                written = {**_Writer(run, film, finished, results).write(progress), "run": identity}
                write_atomically(results / SUMMARY, (json.dumps(written) + "\n").encode())
                for path in (*results.rglob("*"), results):
                    sync(path)
                results.replace(publishing)
                sync(work)
        summary = _read(publishing / SUMMARY)
        assert summary is not None
        _publish(publishing, run.out, own)
        shutil.rmtree(work)
    return summary


def _check_outputs(run: FilmRun) -> None:
    """Refuse outputs that this film cannot have, before anything runs."""
    for output in run.wanted.outputs:
        if output.row.of_scene and output not in OF_FILM:
            raise SettingError(f"outputs: {output} is not for videos; leave it out.")
        if output in OF_FILM and not run.is_joined:
            raise SettingError(
                f"outputs: {output} needs the cameras of the video: choose a model that sees several "
                "frames, and a window of 2 or more."
            )
    if run.options.loop and not run.is_joined:
        raise SettingError(
            "loop needs a model that sees several frames, and a window of 2 or more: leave it out."
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is created; the lock ends with this process."""
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = locked(path)
    except BlockingIOError:
        raise SettingError(
            f"--out {folder}: another run writes there; wait for it, or choose another --out."
        ) from None
    except OSError as error:
        raise SettingError(f"--out {folder}: {error.strerror or 'cannot be written'}.") from None
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _identity(run: FilmRun) -> JSON:
    """What a run that goes on must have in common with the one that was stopped."""
    with run.film.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = stream.tell()
    wanted = {name: value for name, value in asdict(run.wanted).items() if name != "levels"}
    identity = {
        "film": {"bytes": size, "sha256": digest},
        "model": dict(run.engine),
        "frames": asdict(run.options),
        "outputs": {**wanted, "model_size": run.model_size},
    }
    # As it is read back.
    read_back: JSON = json.loads(json.dumps(identity, default=str))
    return read_back


def _is_complete(out: Path, summary: JSON) -> bool:
    """Whether every file of a finished run still exists."""
    try:
        if not all((out / name).exists() for name in summary["files"]):
            return False
        with (out / FRAMES).open(encoding="utf-8") as lines:
            return all(
                (out / value).exists()
                for line in lines
                for value in json.loads(line).values()
                if isinstance(value, str) and value.startswith(f"{FRAME_FILES}/")
            )
    except (OSError, ValueError):
        return False


def _begin(out: Path, work: Path, identity: JSON, own: Sequence[str]) -> None:
    """Begin a run, or go on with it.

    Parameters
    ----------
    own : Sequence[str]
        Results of an earlier run of the same identity, some of which are missing.

    Raises
    ------
    SettingError
        If the folder holds another run, or files that the results would overwrite.
    """
    begun = _read(out / SUMMARY, "run")
    if len(WindowFiles(work / "windows")):
        begun = _read(work / _RUN)
    if begun is not None:
        other = _differences(begun, identity)
        if other:
            raise SettingError(
                f"--out {out}: holds results of another video, model or option ({', '.join(other)}): "
                "choose another --out."
            )
    publishing = work / _PUBLISHING
    _check_names(out, _RESULTS if not (publishing / SUMMARY).exists() else _names(publishing), own)
    if len(WindowFiles(work / "windows")) and begun is not None:
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    write_atomically(work / _RUN, json.dumps(identity).encode())


def _differences(begun: JSON, identity: JSON) -> list[str]:
    """What differs between two runs: names of settings, or ``video`` for the file itself."""
    if begun.get("film") != identity["film"]:
        return ["video"]
    names = dict[str, None]()
    for group in ("model", "frames", "outputs"):
        old = begun.get(group)
        names |= dict.fromkeys(_changed(old if isinstance(old, dict) else {}, identity[group]))
    return [*names]


def _changed(old: JSON, new: JSON) -> Iterator[str]:
    """Names of the values that differ, however deep they are."""
    for name in [*new, *(name for name in old if name not in new)]:
        one, other = old.get(name), new.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changed(one, other)
        elif one != other:
            yield _OPTIONS.get(name, f"--{name.replace('_', '-')}")


def _names(folder: Path) -> list[str]:
    """The results in a folder, the summary last."""
    return [name for name in _RESULTS if (folder / name).exists()]


def _check_names(out: Path, names: Sequence[str], own: Sequence[str]) -> None:
    """Refuse results that would overwrite a file which is not of this run."""
    for name in names:
        if (out / name).exists() and name not in own:
            raise SettingError(
                f"--out {out}: {name} exists already and is not of this run: move it away, or choose "
                "another --out."
            )


def _read(path: Path, key: str | None = None) -> JSON | None:
    """A JSON object in a file, or the one under ``key`` in it; None if it is not there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = value.get(key) if key and isinstance(value, dict) else value
    return value if isinstance(value, dict) else None


def _finish_windows(
    run: FilmRun,
    work: Path,
    files: WindowFiles,
    load: Callable[[], Estimator],
    progress: Progress,
    timings: Timings,
) -> _Finished:
    """Run the model where windows are missing."""
    known = _read(work / _DONE)
    if known is None:
        with run.opened() as film:
            with timings.stage("load"):
                estimator = load()
            _check_engine(run.out, work, files, estimator)
            loaded = estimator.loaded
            total = _about(film, run.options)
            with timings.stage("network"):
                run_windows(
                    estimator, film, files, run.options, lambda done: progress("frames", done, total)
                )
                if run.options.loop:
                    run_loop(estimator, files, run.options)
            known = {
                "tick": str(film.time_base),
                "rate": str(film.rate),
                "model": {
                    "model_id": run.variant.model_id,
                    "license": run.variant.license,
                    "backend": loaded.backend.name,
                    "precision": loaded.backend.precision,
                    "parity": loaded.parity.value,
                },
                "warnings": film.warnings,
            }
            write_atomically(work / _DONE, json.dumps(known).encode())
    return _Finished(Fraction(known["tick"]), Fraction(known["rate"]), known["model"], known["warnings"])


def _check_engine(out: Path, work: Path, files: WindowFiles, estimator: Estimator) -> None:
    """Keep which engine runs the windows; raises SettingError if another one ran those that exist."""
    loaded = estimator.loaded
    backend = f"{loaded.backend.name} {loaded.backend.precision}"
    engine = {"backend": backend, "digest": loaded.digest()}
    begun = _read(work / _ENGINE) or {}
    if not len(files):
        write_atomically(work / _ENGINE, json.dumps(engine).encode())
    elif begun.get("backend") != backend:
        raise SettingError(
            f"--out {out}: was begun with {begun.get('backend')}, and this run has {backend}: choose "
            "the same --backend, or another --out."
        )
    elif begun != engine:
        raise SettingError(
            f"--out {out}: was begun with another engine of this model: choose another --out."
        )


def _about(film: Film, options: WindowOptions) -> int | None:
    """About how many frames will be used; None if the film does not state its duration."""
    if not film.seconds:
        return None
    rate = float(film.rate) / options.pick.every
    if options.pick.fps is not None:
        rate = min(float(film.rate), options.pick.fps)
    return max(1, round(film.seconds * rate))


def _publish(results: Path, out: Path, own: Sequence[str]) -> None:
    """Move complete results to the folder OUT, the summary last; ``own`` are those it may overwrite."""
    names = _names(results)
    _check_names(out, names, own)
    for name in names:
        if name == SUMMARY:
            sync(out)
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (results / name).replace(out / name)
    sync(out)


class _Writer:
    """Writes the results of a joined film, frame by frame."""

    def __init__(self, run: FilmRun, film: JoinedFilm, finished: _Finished, folder: Path) -> None:
        self._run, self._film, self._finished, self._folder = run, film, finished, folder
        outputs = run.wanted.outputs
        # One range for the whole film, so that previews do not flicker.
        self._levels = levels_of(film.sample.depth, run.wanted.tone)
        of_frames = tuple(each for each in outputs if each not in OF_FILM)
        self._wanted = replace(run.wanted, outputs=of_frames, levels=self._levels)
        self._of_film = [output for output in OF_FILM if output in outputs]
        self._clouds: list[Cloud] = []
        self._counts = array("q")  # points of each frame
        self._cameras = array("d")  # of each frame: its intrinsics and extrinsics, row by row
        self._warnings = dict.fromkeys([*finished.warnings, *film.warnings])
        confidence, percentile = film.sample.confidence, run.wanted.points.confidence
        # The confidence of a point is at least that at the percentile of the whole film.
        self._least = 0.0 if confidence is None else float(np.percentile(confidence, percentile))

    def write(self, progress: Progress) -> JSON:
        """Write everything but the summary, which is returned."""
        film, folder = self._film, self._folder
        first = film.files.load(0)
        height, width = first.images.shape[1:3]
        if not self._run.model_size:
            width, height = first.width, first.height
        shape = width, height, self._finished.time_base, self._finished.rate
        (folder / FRAME_FILES).mkdir()
        with (
            DepthFilm(folder / DEPTH, *shape, farthest=film.farthest, unit=film.unit) as depth,
            PreviewFilm(folder / PREVIEW, *shape) as preview,
            (folder / FRAMES).open("w", encoding="utf-8") as lines,
        ):
            for index, (time, seen) in enumerate(film.frames()):
                prediction = replace(resize_prediction(seen.model, width, height), seen=seen)
                duration = self._duration(index)
                values = prediction.depth.values
                depth.write(values, time, duration)
                gray = self._levels.gray(values)
                preview.write(color_preview(gray, self._wanted.color_map), time, duration)
                lines.write(json.dumps(self._frame(index, time, prediction)) + "\n")
                self._collect(index, seen)
                progress("write", index + 1, len(film.times))
        if not any((folder / FRAME_FILES).iterdir()):
            (folder / FRAME_FILES).rmdir()
        return {
            "film": self._run.film.name,
            "width": width,
            "height": height,
            "frames": len(film.times),
            "seconds": self._seconds(film.times[-1] + self._duration(len(film.times) - 1)),
            "unit": film.unit.value,
            "depth_scale": depth.scale,
            **self._finished.model,
            **self._of_windows(),
            "files": sorted(path.name for path in folder.iterdir()),
            "warnings": [*self._warnings],
        }

    def _seconds(self, time: int) -> float:
        return round(float(time * self._finished.time_base), 6)

    def _duration(self, index: int) -> int:
        """How long a frame is shown, in units of time; the last one as long as the one before."""
        times = self._film.times
        at = min(index, len(times) - 2)
        if at < 0:
            return max(1, round(1 / self._finished.rate / self._finished.time_base))
        return times[at + 1] - times[at]

    def _frame(self, index: int, time: int, prediction: Prediction) -> JSON:
        """Write a frame's own files; returns its line."""
        name, files, facts = f"{index:06d}", dict[str, str | None](), JSON()
        for each in described_outputs([prediction], self._wanted, [f"{name}.jpg"]):
            self._warnings |= dict.fromkeys(each.warnings)
            facts |= each.facts
            if each.file is not None:
                ending = each.output.row.ending
                (self._folder / FRAME_FILES / f"{name}{ending}").write_bytes(each.file)
                files[each.output] = f"{FRAME_FILES}/{name}{ending}"
        values, camera = prediction.depth.values, prediction.camera
        facts["camera"] = None if camera is None else camera.as_lists()
        return {
            "frame": index,
            "seconds": self._seconds(time),
            "min_depth": float(values.min()),
            "max_depth": float(values.max()),
            **facts,
            **files,
        }

    def _collect(self, index: int, seen: Seen) -> None:
        """Keep a frame's camera, and its share of the points."""
        if not self._film.is_joined:
            return
        assert seen.model.camera is not None
        for matrix in seen.model.camera:
            self._cameras.extend(matrix.ravel().tolist())
        options, count = self._run.wanted.points, 0
        each, every = spread(options.most, len(self._film.times))
        if self._of_film and index % every == 0:
            # OutputError: no pixel of this frame remains.
            with suppress(OutputError):
                self._clouds.append(cloud_of([seen], replace(options, most=each), self._least))
                count = self._clouds[-1].counts[0]
        self._counts.append(count)
        if len(self._clouds) == _CLOUDS:
            self._clouds = [self._cloud()]

    def _cloud(self) -> Cloud:
        """The points so far."""
        return joined_clouds(self._clouds, self._film.sample.confidence is not None)

    def _camera(self, index: int) -> Camera:
        numbers = np.frombuffer(self._cameras).reshape(-1, 21)[index]
        return Camera(numbers[:9].reshape(3, 3).astype(np.float32), numbers[9:].reshape(3, 4))

    def _of_windows(self) -> JSON:
        """Write what windows have together; returns its facts."""
        film, folder = self._film, self._folder
        if not film.is_joined:
            return {"windows": len(film.places), "track": None, "joins": None, "drift": None}
        poses = np.frombuffer(self._cameras).reshape(-1, 21)[:, 9:].reshape(-1, 3, 4)
        seconds = [self._seconds(time) for time in film.times]
        (folder / TRACK).write_text(tum(seconds, poses, film.unit), encoding="utf-8")
        rows = [
            {
                "seconds": self._seconds(film.times[(index + 1) * film.step]),
                "scale": place.scale,
                **{name: value for name, value in join._asdict().items() if name != "similarity"},
            }
            for index, (join, place) in enumerate(zip(film.joins, film.places[1:], strict=True))
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / JOINS).write_text(text, encoding="utf-8")
        self._write_points(folder)
        length = _length(poses)
        drift = film.drift and {
            **film.drift._asdict(),
            "share_of_track": film.drift.distance / length if length else None,
        }
        names = ("depth_error", "rotation_error", "center_error")
        scales = [place.scale for place in film.places]
        range_of_scale = {"scale_min": min(scales), "scale_max": max(scales)}
        return {
            "windows": len(film.places),
            "track": {"length": length, "unit": film.unit.value},
            "joins": {name: max(row[name] for row in rows) for name in names} | range_of_scale
            if rows
            else None,
            "drift": drift,
        }

    def _write_points(self, folder: Path) -> None:
        if not self._of_film:
            return
        if not self._clouds:
            raise OutputError(
                "No pixel remains as a point: send a smaller points_confidence, points_edge 0, or "
                "points_sky true."
            )
        count, unit = len(self._counts), self._film.unit
        cloud = replace(self._cloud(), counts=list(self._counts))
        one = self._film.files.load(0).seen(0)

        def views(indices: Sequence[int]) -> tuple[list[Seen], list[str]]:
            seen = [_camera_only(one, self._camera(index)) for index in indices]
            return seen, [f"{index:06d}.jpg" for index in indices]

        for output in self._of_film:
            if output is Output.GLB:
                shown = np.linspace(0, count - 1, min(count, _MOST_CAMERAS)).round().astype(int)
                data = glb(cloud, *views(shown.tolist()), unit, self._wanted.cameras)
            elif output is Output.PLY:
                data = ply(cloud, unit)
            else:
                data = colmap(cloud, *views(range(count)))
            (folder / f"{STEM}{output.row.ending}").write_bytes(data)


def _camera_only(seen: Seen, camera: Camera) -> Seen:
    """A frame's camera without its maps, so that thousands of frames fit into memory."""
    height, width = seen.image.shape[:2]
    nothing = np.broadcast_to(np.float32(0), (height, width))
    image: NDArray[np.uint8] = np.broadcast_to(np.uint8(0), (height, width, 3))
    model = Prediction(Depth(nothing, seen.model.depth.unit), camera, {}, None, [])
    return replace(seen, image=image, model=model)


def _length(poses: NDArray[np.floating]) -> float:
    """Length of the trajectory through the cameras [N, 3, 4], world to camera."""
    rotations = np.swapaxes(poses[:, :, :3], 1, 2)
    centers = -(rotations @ poses[:, :, 3:])[:, :, 0]
    return float(np.linalg.norm(np.diff(centers, axis=0), axis=1).sum())
