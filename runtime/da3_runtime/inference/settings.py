"""Settings of inference: input size and batches."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import ClassVar

from pydantic.dataclasses import dataclass

from da3_runtime.util.setting_group import CONFIG, setting
from da3_runtime.variants import MAX_SIDE, MIN_SIDE


@dataclass(frozen=True, config=CONFIG)
class InferenceSettings:
    """Input size and batches of a loaded model."""

    title: ClassVar[str] = "Inference"

    _: KW_ONLY
    processing_res: int | None = setting(
        None,
        "Longest side of the network's input, in pixels. Unset: the model's own, 504, or 168 for "
        "da3-nano.",
        low=MIN_SIDE,
        high=MAX_SIDE,
    )
    max_batch: int | None = setting(
        None,
        "Most images of one size that run as one batch, if they wait for the model at the same time. "
        "Unset: 8 on a GPU, and 1 on a CPU, which gains nothing from batches.",
        low=1,
        high=64,
    )
    batch_wait_ms: int = setting(
        0,
        "How long a batch with room waits for requests that are being decoded, in milliseconds.",
        low=0,
        high=10_000,
    )
