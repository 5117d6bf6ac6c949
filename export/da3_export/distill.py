"""Distill an SDT head from a variant's own DPT head, on photos that need no depth.

The backbone and the DPT head stay as they are. The SDT head learns to give the DPT head's maps from the
same features, so the photos should be like those that it will be used on.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from da3_export.crops import LEAST_LONGEST, PhotoFolder, RandomCrops, Split, in_order, split
from da3_export.curve import Curve
from da3_export.losses import gradient_matching
from da3_export.optimizers import Optimizers, share_of_peak
from da3_export.util.progress import Progress
from da3_export.util.tensors import save_tensors
from da3_runtime.errors import BuildError, SettingError
from da3_runtime.network import precision
from da3_runtime.network.dpt import activate
from da3_runtime.network.dysample import DySample
from da3_runtime.network.load import build_sdt, feature_width, load_network, load_sdt
from da3_runtime.network.network import DepthNetwork
from da3_runtime.network.sdt import SDT
from da3_runtime.store.manifest import sha256_of
from da3_runtime.util.files import locked, write_atomically
from da3_runtime.variants import Graph, Series, Variant

STATE_ENDING = ".state.pt"
REPORTS = 20  # of a run, at least
_REPORT_EVERY = 100  # steps, at most
_SAVE_EVERY = 300.0  # seconds, where reports are further apart


@dataclass(frozen=True)
class Distillation:
    """What is distilled, and how. Two runs of equal ones on one CPU give the same head.

    Attributes
    ----------
    variant : Variant
        The model.
    photos : PhotoFolder
        The photos.
    fused : int
        Width of the head's fused map.
    steps, batch, longest : int
        Number of steps, images of each, longest side of the largest crop in pixels.
    seed : int
        Decides first weights and crops.
    held_out : float
        Percent of the photos to hold out.
    start : Path | None
        A head to start from; None starts from nothing.

    Raises
    ------
    SettingError
        If a number is out of its range.
    """

    variant: Variant
    photos: PhotoFolder
    fused: int
    steps: int
    batch: int
    longest: int
    seed: int = 0
    held_out: float = 5.0
    start: Path | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("steps", self.steps, 1),
            ("batch", self.batch, 1),
            ("longest", self.longest, LEAST_LONGEST),
            ("seed", self.seed, 0),
        ):
            if not least <= value < 2**63:
                raise SettingError(f"--{name} {value}: give a whole number from {least}.")
        if not 0 < self.held_out <= 50:
            raise SettingError(f"--held-out {self.held_out:g}: give a percentage from above 0 to 50.")

    def settings(self, checkpoint: Path) -> dict[str, str]:
        """Everything that decides the result, by option."""
        files = {"the checkpoint": checkpoint, "the head to start from": self.start}
        digests = {name: f"SHA-256 {sha256_of(path)[:12]}" for name, path in files.items() if path}
        return {
            "--model": self.variant.model_id,
            **digests,
            "--images": f"{len(self.photos.names)} photos (digest {self.photos.digest()})",
            "SDT_FUSION_CHANNELS": str(self.fused),
            "--steps": str(self.steps),
            "--batch": str(self.batch),
            "--longest": str(self.longest),
            "--seed": str(self.seed),
            "--held-out": f"{self.held_out:g}",
        }


def distill(task: Distillation, checkpoint: Path, out: Path, workers: int = 0) -> float:
    """Distill an SDT head and write it to ``out``, stored in FP16; continue a run that was stopped.

    Beside ``out`` are written NAME.curve.jsonl and NAME.curve.svg, and while the run lasts
    NAME.state.pt, from which the same call continues.

    Parameters
    ----------
    checkpoint : Path
        The variant's checkpoint.
    workers : int
        Processes that read photos; 0 reads them in this one.

    Returns
    -------
    float
        Mean AbsRel of the head's depth against the DPT head's on the held-out photos.

    Raises
    ------
    CheckpointError
        If the checkpoint does not fit the variant, or ``start`` its features.
    SettingError
        If fewer than two photos can be read; if ``out`` cannot be written, another run writes it, or an
        unfinished run with other settings did.
    BuildError
        If the loss is not finite, or a file cannot be written on the way.
    """
    for path in (out, *Curve.paths(out), out.with_suffix(STATE_ENDING)):
        if path.is_dir():
            raise SettingError(f"--out {out}: {path.name} is a folder; give another name.")
    with _lock(out):
        run = _Run(task, checkpoint, out)
        try:
            return run.run(workers)
        except BrokenPipeError:  # of the messages
            raise
        except OSError as error:
            raise BuildError(
                f"--out {out}: {error.strerror or 'input/output error'} while writing a file beside it; "
                "the same command goes on from the last saved state."
            ) from error


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keep other runs from a file, whose folder is created; the lock ends with this process."""
    path = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = locked(path)
    except BlockingIOError:
        raise SettingError(
            f"--out {out}: another run writes it; wait for its end, or give another name."
        ) from None
    except OSError as error:
        raise SettingError(f"--out {out}: {error.strerror or 'cannot be written'}.") from None
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@dataclass
class _State:
    """Everything that a stopped run needs to continue.

    Attributes
    ----------
    settings : dict[str, str]
        Of :meth:`Distillation.settings`.
    head, optimizers : SDT, Optimizers
        The head, and what learns it.
    lines : list[dict[str, float]]
        The curve so far.
    sums : dict[str, float]
        Sums of the losses of the steps since the last line, by name; their number under ``steps``.
    step : int
        Number of steps that were done.
    """

    settings: dict[str, str]
    head: SDT
    optimizers: Optimizers
    lines: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    step: int = 0

    def add(self, losses: dict[str, float]) -> None:
        """Count a step with these losses."""
        for name, value in ({"steps": 1.0} | losses).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.step += 1

    def means(self) -> dict[str, float]:
        """Mean losses since the last call."""
        steps = self.sums.pop("steps")
        means = {name: value / steps for name, value in self.sums.items()}
        self.sums = {}
        return means

    def save(self, path: Path) -> None:
        """Write to ``path``; a stop in the middle leaves the state that was there."""
        content = {
            "settings": self.settings,
            "head": self.head.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "lines": self.lines,
            "sums": self.sums,
            "step": self.step,
        }
        buffer = io.BytesIO()  # PyTorch hides why it cannot write a file
        torch.save(content, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Continue from a state that :meth:`save` wrote.

        Raises
        ------
        SettingError
            If it is damaged, or of a run with other settings.
        """
        anew = f"or delete {path.name} to begin anew"
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            settings = dict(content["settings"])
        except Exception:  # PyTorch raises nearly anything for a file that is not its own
            raise SettingError(
                f"{path.name}, the state of an unfinished run, is damaged: give another --out, {anew}."
            ) from None
        mine = self.settings
        names = [name for name in {**settings, **mine} if settings.get(name) != mine.get(name)]
        other = [f"{name} {settings.get(name, 'not given')}" for name in names]
        if other:
            raise SettingError(
                f"{path.name} is of an unfinished run with {', '.join(other)}: "
                f"give the same again, {anew}."
            )
        self.head.load_state_dict(content["head"])
        self.optimizers.load_state_dict(content["optimizers"])
        self.lines, self.sums, self.step = content["lines"], content["sums"], content["step"]


class _Run:
    """One run of :func:`distill`, with the lock held."""

    def __init__(self, task: Distillation, checkpoint: Path, out: Path) -> None:
        self._task, self._checkpoint, self._out = task, checkpoint, out
        self._state_path = out.with_suffix(STATE_ENDING)
        self._progress = Progress(f"{task.variant.model_id}/sdt", 1)
        self._unreadable: dict[str, str] = {}
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(task.seed)
        self._graph = next(graph for graph in task.variant.graphs if graph.takes_sdt)
        width = feature_width(self._graph)
        head = (
            build_sdt(width, task.fused)
            if task.start is None
            else load_sdt(width, task.start, task.fused)
        )
        head = head.to(self._device).train().requires_grad_(True)
        sampling = [module for module in head.modules() if isinstance(module, DySample)]
        self._state = _State(task.settings(checkpoint), head, Optimizers(head, [head], but_not=sampling))
        if self._state_path.exists():
            self._state.load(self._state_path)
            self._progress.log(f"continuing at step {self._state.step} of {task.steps}")

    def run(self, workers: int) -> float:
        task, state = self._task, self._state
        parts = split(task.photos, task.held_out, task.longest)
        self._log_photos(parts)
        teacher = load_network(task.variant, self._graph, self._checkpoint, precision.FP32)
        teacher = teacher.to(self._device)
        curve = Curve(self._out, f"{task.variant.model_id}: SDT head distilled from the DPT head")
        curve.write(state.lines)  # a file that cannot be written must not cost a run
        crops = RandomCrops(task.photos, parts.training, task.batch, task.longest, task.seed)
        every = max(1, min(_REPORT_EVERY, task.steps // REPORTS))
        saved = clock = time.monotonic()
        counted = state.step
        with self._progress.step("distill", task.steps, counted) as advance:
            for images, unreadable in in_order(crops, state.step, task.steps, workers):
                self._name(unreadable)
                if images is None:
                    raise SettingError(f"--images {task.photos.folder}: no photo can be read any more.")
                try:
                    losses = self._learn(teacher, images)
                except torch.OutOfMemoryError:
                    raise SettingError(
                        f"--batch {task.batch} at --longest {task.longest} does not fit into the GPU's "
                        "memory: give a smaller one."
                    ) from None
                state.add(losses)
                advance(f"{losses['loss']:.3f}")
                is_reported = state.step % every == 0 or state.step == task.steps
                if is_reported:
                    seconds = (time.monotonic() - clock) / (state.step - counted)
                    figures = self._figures(teacher, list(parts.held_out.values()))
                    figures["seconds_per_step"] = round(seconds, 3)
                    state.lines.append({"step": state.step} | figures)
                    curve.write(state.lines)
                    text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                    self._progress.log(f"{state.step}/{task.steps}: {text}")
                    clock, counted = time.monotonic(), state.step
                if is_reported or time.monotonic() - saved > _SAVE_EVERY:
                    state.save(self._state_path)
                    saved = time.monotonic()
        if self._unreadable:
            count = f"{len(self._unreadable)} of {len(task.photos.names)} photos"
            self._progress.log(f"{count} could not be read and were left out")
        self._write_head()
        self._state_path.unlink(missing_ok=True)
        return state.lines[-1]["held_out_abs_rel"]

    def _learn(self, teacher: DepthNetwork, images: Tensor) -> dict[str, float]:
        """Do one step; returns its losses by name."""
        state = self._state
        with torch.no_grad():
            features = teacher.backbone.pretrained(images[:, None].to(self._device))
            wanted = teacher.head(features)
        series = self._graph.series
        parts = _losses(activate(state.head(features), series), wanted, series)
        total = sum(parts.values(), torch.zeros((), device=self._device))
        state.head.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(state.head.parameters(), 1.0)
        state.optimizers.step(share_of_peak(state.step, self._task.steps))
        return {name: value.item() for name, value in ({"loss": total} | parts).items()}

    def _figures(self, teacher: DepthNetwork, held_out: list[Tensor]) -> dict[str, float]:
        """Mean losses since the last figures, and the error on the held-out photos."""
        means = self._state.means()
        if not math.isfinite(means["loss"]):
            raise BuildError(
                f"The loss is not finite at step {self._state.step}: the checkpoint is damaged, or the "
                "head diverged; try another --seed."
            )
        self._state.head.eval()
        error = abs_rel(teacher, self._graph, self._state.head, held_out)
        self._state.head.train()
        return {name: round(value, 6) for name, value in (means | {"held_out_abs_rel": error}).items()}

    def _log_photos(self, parts: Split) -> None:
        text = f"{len(parts.training)} photos to learn from, {len(parts.held_out)} held out"
        skipped = self._task.photos.skipped
        self._progress.log(f"{text}; skipped: {skipped}" if skipped else text)
        self._name(parts.unreadable)

    def _name(self, unreadable: dict[str, str]) -> None:
        """Name photos that cannot be read, each once."""
        for name in unreadable.keys() - self._unreadable.keys():
            self._progress.log(f"{name} is left out: {unreadable[name]}")
        self._unreadable |= unreadable

    def _write_head(self) -> None:
        tensors = {
            name: value.half().cpu().contiguous() if value.is_floating_point() else value.cpu()
            for name, value in self._state.head.state_dict().items()
        }
        save_tensors(tensors, self._out)


def abs_rel(teacher: DepthNetwork, graph: Graph, head: SDT, images: list[Tensor]) -> float:
    """Mean of |d - t| / t over photos, of a head's depth d against the depth t of the DPT head.

    Parameters
    ----------
    teacher : DepthNetwork
        The network with its DPT head.
    head : SDT
        In eval mode, on the same device.
    images : list[Tensor]
        Photos, uint8 [1, 1, H, W, 3] each.
    """
    device = next(head.parameters()).device
    errors = []
    with torch.inference_mode():
        for image in images:
            features = teacher.backbone.pretrained(image.to(device))
            wanted, _ = teacher.head(features)
            depth, _ = activate(head(features), graph.series)
            errors.append(((depth - wanted).abs() / wanted).mean().item())
    return math.fsum(errors) / len(errors)


def _losses(
    maps: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], series: Series
) -> dict[str, Tensor]:
    """Differences of log depth, of its slopes, and of the second map."""
    residual = torch.log(maps[0]) - torch.log(wanted[0])
    mask = torch.ones_like(residual, dtype=torch.bool)
    if series is Series.ANYVIEW:
        second = (torch.log(maps[1]) - torch.log(wanted[1])).abs().mean()
    else:
        second = (maps[1] - wanted[1]).abs().mean()
    return {
        "depth": residual.abs().mean(),
        "gradient": gradient_matching(residual, mask),
        series.outputs[1]: 0.2 * second,
    }
