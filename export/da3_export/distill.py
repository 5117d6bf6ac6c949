"""Distill an SDT head from a variant's own DPT head, on photos that need no depth.

The backbone and the DPT head stay as they are. The SDT head learns to give the DPT head's maps from the
same features, so the photos should be like those that it will be used on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from da3_export.losses import gradient_matching
from da3_export.optimizers import Optimizers, share_of_peak
from da3_export.photos import find_photos, read_photo
from da3_export.util.progress import Progress
from da3_export.util.tensors import save_tensors
from da3_runtime.errors import ImageError, SettingError
from da3_runtime.network import precision
from da3_runtime.network.dpt import activate
from da3_runtime.network.dysample import DySample
from da3_runtime.network.load import build_sdt, feature_width, load_network, load_sdt
from da3_runtime.variants import PATCH, Series, Variant

SMALLEST = 0.6  # longest side of the smallest crop, as a share of the largest
ASPECTS = (4 / 3, 3 / 4, 3 / 2, 1.0)
_TRIES = 20  # photos that may be unreadable in a row
_REPORT_EVERY = 100  # steps


class Photos(Dataset[Tensor]):
    """A batch of random image crops for every step, uint8 [B, H, W, 3].

    Parameters
    ----------
    folder : Path
        Folder of photos; folders below it count too.
    steps, batch, longest : int
        Number of batches, images in each, longest side of the largest crop in pixels.
    seed : int
        Decides every crop.

    Raises
    ------
    SettingError
        If the folder has no photo.
    """

    def __init__(self, folder: Path, steps: int, batch: int, longest: int, seed: int) -> None:
        self.steps, self.batch, self.longest, self.seed = steps, batch, longest, seed
        self.files = find_photos(folder)
        if not self.files:
            raise SettingError(f"--images {str(folder)!r} is not a folder with photos in it.")

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.seed, step, 2])
        longest, aspect = self.longest * rng.uniform(SMALLEST, 1), rng.choice(ASPECTS)
        width, height = (longest, longest / aspect) if aspect >= 1 else (longest * aspect, longest)
        size = (max(6, round(height / PATCH)) * PATCH, max(6, round(width / PATCH)) * PATCH)
        return torch.from_numpy(np.stack([self._image(rng, *size) for _ in range(self.batch)]))

    def _image(self, rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
        for _ in range(_TRIES):
            path = self.files[rng.integers(len(self.files))]
            try:
                rgb = read_photo(path).rgb
            except (ImageError, OSError):
                continue
            return _crop(rng, rgb, height, width)
        raise SettingError(f"--images: {path.name} and many others cannot be read as images.")


def _crop(
    rng: np.random.Generator, rgb: NDArray[np.uint8], height: int, width: int
) -> NDArray[np.uint8]:
    """A random crop resized to the shape, at least half as large as possible, mirrored or not."""
    largest = min(rgb.shape[0] / height, rgb.shape[1] / width)
    scale = largest * rng.uniform(0.5, 1)
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    top, left = rng.integers(rgb.shape[0] - h + 1), rng.integers(rgb.shape[1] - w + 1)
    crop = rgb[top : top + h, left : left + w]
    if rng.uniform() < 0.5:
        crop = crop[:, ::-1]
    mode = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    resized = cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=mode)
    return np.asarray(resized, np.uint8)


def distill(
    variant: Variant,
    checkpoint: Path,
    photos: Photos,
    fused: int,
    workers: int,
    out: Path,
    start: Path | None = None,
) -> None:
    """Distill an SDT head and write it to ``out``, stored in FP16.

    Parameters
    ----------
    checkpoint : Path
        The variant's checkpoint.
    fused : int
        Width of the head's fused map.
    workers : int
        Processes that read photos; 0 reads them in this one.
    start : Path | None
        A head to start from; None starts from nothing.

    Raises
    ------
    CheckpointError
        If the checkpoint does not fit the variant, or ``start`` its features.
    SettingError
        If too many photos cannot be read.
    OSError
        If ``out`` cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(photos.seed)
    graph = next(graph for graph in variant.graphs if graph.takes_sdt)
    teacher = load_network(variant, graph, checkpoint, precision.FP32).to(device)
    width = feature_width(graph)
    student = build_sdt(width, fused) if start is None else load_sdt(width, start, fused)
    student = student.to(device).train().requires_grad_(True)
    sampling = [module for module in student.modules() if isinstance(module, DySample)]
    optimizers = Optimizers(student, [student], but_not=sampling)
    progress = Progress(f"{variant.model_id}/sdt", 1)
    with progress.step("distill", photos.steps) as advance:
        for step, images in enumerate(_batches(photos, workers), start=1):
            with torch.no_grad():
                features = teacher.backbone.pretrained(images[:, None].to(device))
                wanted = teacher.head(features)
            parts = _losses(activate(student(features), graph.series), wanted, graph.series)
            total = sum(parts.values(), torch.zeros((), device=device))
            student.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizers.step(share_of_peak(step - 1, photos.steps))
            advance(f"{parts['depth'].item():.3f}")
            if step % _REPORT_EVERY == 0 or step == photos.steps:
                figures = ", ".join(f"{name} {value.item():.4f}" for name, value in parts.items())
                progress.log(f"{step}/{photos.steps}: {figures}")
    tensors = {
        name: value.half().cpu().contiguous() if value.is_floating_point() else value.cpu()
        for name, value in student.state_dict().items()
    }
    save_tensors(tensors, out)


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


def use_one_thread(worker: int) -> None:
    """Keep a process that loads data to one core."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _batches(photos: Photos, workers: int) -> Iterator[Tensor]:
    loader: DataLoader[Tensor] = DataLoader(
        photos, batch_size=None, num_workers=workers, worker_init_fn=use_one_thread
    )
    return itertools.islice(loader, photos.steps)
