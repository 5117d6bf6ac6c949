"""Depth Anything 3 engines: depth of photos from Python, the command line or a server.

>>> import da3_runtime as da3
>>> with da3.load("da3-nano") as model:
...     depth = model.depth("examples/temple.jpg")
>>> depth.values.shape, str(depth.unit)
((427, 640), 'relative')

Importing this package is quick: NumPy and the backends are imported when a model is loaded. Nothing here
imports ``da3_export``, and no module outside :mod:`da3_runtime.network` imports PyTorch before it is
needed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypedDict, Unpack

from da3_runtime.errors import DA3Error, ImageError, InferenceError, SettingError

if TYPE_CHECKING:
    from da3_runtime.inference.model import ImageDepth, Model

__all__ = [
    "DA3Error",
    "ImageDepth",
    "ImageError",
    "InferenceError",
    "Model",
    "ModelOptions",
    "SettingError",
    "load",
]

# From 1.29 on, ONNX Runtime's Linux builds report models and machines to its makers, and keep an id of
# the machine, unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# The only place that states the version; packaging reads it here.
__version__ = "0.2.0"


class ModelOptions(TypedDict, total=False):
    """Settings that :func:`load` takes; docs/settings.md describes each, in capitals."""

    head: str
    ray_pose: bool
    engine_dir: str | os.PathLike[str]
    engine_repo: str | None
    cached_models_dir: str | os.PathLike[str]
    weights: str | os.PathLike[str] | None
    revision: str | None
    sdt_weights: str | os.PathLike[str] | None
    backend: str
    threads: int
    runtime_cache_dir: str | os.PathLike[str] | None
    processing_res: int | None
    max_batch: int | None
    batch_wait_ms: int
    max_image_pixels: int
    max_image_bytes: int


def load(model: str | None = None, **options: Unpack[ModelOptions]) -> Model:
    """Load a model: on the best engine that can run here, else in PyTorch.

    Parameters
    ----------
    model : str | None
        Model id in any case, or its hub repository. None: the environment variable MODEL, else
    da3-small. **options
        Settings, named as their environment variables in lower case; an option goes before its variable.
        See :class:`ModelOptions`.

    Returns
    -------
    Model
        Use it in a ``with`` statement, or close it; threads may share it.

    Raises
    ------
    SettingError
        If there is no such option or model, or a value is not what an option takes.
    BackendUnavailableError, CheckpointError
        If nothing that is installed here can run the model, or its weights are missing.

    Examples
    --------
    >>> import da3_runtime as da3
    >>> with da3.load("da3-nano", backend="onnxruntime-cpu", threads=1) as model:
    ...     print(model)
    <Model da3-nano with head dpt on onnxruntime-cpu fp32>
    """
    from da3_runtime.inference.model import Model
    from da3_runtime.settings import Settings

    unknown = [name for name in options if name not in ModelOptions.__annotations__]
    if unknown:
        known = ", ".join(ModelOptions.__annotations__)
        raise SettingError(f"{unknown[0]} is not an option of load; there are: {known}.")
    named = {} if model is None else {"MODEL": model, "MODEL_ID": ""}
    headless = {"HEAD": "", "USE_SDT_HEAD": ""} if "head" in options else {}
    values = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in options.items()
    }
    settings = Settings.from_env({**os.environ, **named, **headless}).changed(**values)
    return Model(settings.engine, settings.images, settings.inference)


def __getattr__(name: str) -> object:
    if name in ("ImageDepth", "Model"):
        from da3_runtime.inference import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
