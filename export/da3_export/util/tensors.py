"""Writes safetensors files atomically: a reader never sees a partial file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from da3_runtime.util.files import move_into_place


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a temporary file and move it to ``path`` when it is complete.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    try:
        save_file(tensors, partial, metadata=dict(metadata) if metadata else None)
        move_into_place(partial, path)
    except SafetensorError as error:
        # safetensors hides the system's error; its code is at the end of the message.
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), path.name) from error
    finally:
        partial.unlink(missing_ok=True)
