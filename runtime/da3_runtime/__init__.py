"""Depth Anything 3 engines: depth maps of photos, from Python, the command line or a server.

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

from da3_runtime.errors import DA3Error, ImageError, InferenceError, OutputError, SettingError

if TYPE_CHECKING:
    from da3_runtime.inference.model import ImageDepth, Model, SceneDepth
    from da3_runtime.postprocess.points import PointOptions

__all__ = [
    "DA3Error",
    "ImageDepth",
    "ImageError",
    "InferenceError",
    "Model",
    "ModelOptions",
    "OutputError",
    "PointOptions",
    "SceneDepth",
    "SettingError",
    "load",
]

# Since 1.29, ONNX Runtime's Linux builds send telemetry about models and machines, and store a machine
# id, unless this variable is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# OpenCV prints to stderr about each damaged image, which is reported as an error anyway.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

# The only place that states the version; packaging reads it here.
__version__ = "0.2.0"


class ModelOptions(TypedDict, total=False):
    """Options of :func:`load`; docs/settings.md describes each under its name in capitals."""

    head: str
    ray_pose: bool
    engine_dir: str | os.PathLike[str]
    engine_repo: str | None
    cached_models_dir: str | os.PathLike[str]
    weights: str | os.PathLike[str] | None
    revision: str | None
    sdt_weights: str | os.PathLike[str] | None
    backend: str
    precision: str
    threads: int
    runtime_cache_dir: str | os.PathLike[str] | None
    processing_res: int | None
    max_batch: int | None
    batch_wait_ms: int
    max_image_pixels: int
    max_image_bytes: int


def load(model: str | None = None, **options: Unpack[ModelOptions]) -> Model:
    """Load a model with the best engine that this machine can run, or in PyTorch if it can run none.

    Parameters
    ----------
    model : str | None
        Model id in any case, or its hub repository. None: the environment variable MODEL; if that is
        unset, da3-small.
    **options
        Settings: the names of their environment variables in lower case. An option overrides its
        variable. See :class:`ModelOptions`.

    Returns
    -------
    Model
        The loaded model. Use it in a ``with`` statement, or close it. Threads may share it.

    Raises
    ------
    SettingError
        If an option or the model is unknown, or an option's value is invalid.
    BackendUnavailableError
        If no installed backend can run the model.
    CheckpointError
        If the model's weights are missing.

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
        raise SettingError(f"{unknown[0]} is not an option of load; the options are: {known}.")
    named = {} if model is None else {"MODEL": model, "MODEL_ID": ""}
    headless = {"HEAD": "", "USE_SDT_HEAD": ""} if "head" in options else {}
    values = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in options.items()
    }
    env = {**os.environ, **named, **headless}
    # A server's variables, such as PORT, are no concern of a model's.
    groups = ("engine", "images", "inference")
    settings = Settings.from_env(env, groups=groups, own_files=True).changed(**values)
    return Model(settings.engine, settings.images, settings.inference)


def __getattr__(name: str) -> object:
    if name in ("ImageDepth", "Model", "SceneDepth"):
        from da3_runtime.inference import model

        return getattr(model, name)
    if name == "PointOptions":
        from da3_runtime.postprocess.points import PointOptions

        return PointOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
