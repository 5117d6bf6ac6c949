"""What the command lines of ``python -m da3_export`` and ``python -m da3_runtime`` share.

Each option that names an engine stands for the environment variable of the same name, so both are
checked in one place.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from da3_runtime.errors import DA3Error, SettingError
from da3_runtime.settings import Settings

# What the disk says that is nobody's mistake in the code.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}

OPTIONS = {
    "model": ("MODEL", "model id or hub repository; da3-small; export engines takes all"),
    "head": ("HEAD", "head; dpt"),
    "weights": ("WEIGHTS", "hub, random:SEED (export only), a folder or a .safetensors file"),
    "sdt_weights": ("SDT_WEIGHTS", ".safetensors file of a fine-tuned SDT head"),
    "revision": ("REVISION", "branch, tag or commit of the hub repository"),
    "ray_pose": ("RAY_POSE", "1 for the ray branch, and the camera from its rays; 0"),
    "hardware_compatible": ("HARDWARE_COMPATIBLE", "1 for a TensorRT plan for all GPUs from 8.0 on; 0"),
    "version_compatible": ("VERSION_COMPATIBLE", "1 for a TensorRT plan that tensorrt-lean takes; 0"),
    "engine_dir": ("ENGINE_DIR", "where engine folders lie; engines"),
    "backend": ("BACKEND", "run this backend only; auto"),
    "processing_res": ("PROCESSING_RES", "longest side of the model's input; 504, da3-nano's 168"),
    "threads": ("THREADS", "CPU threads of a backend; 0 for all cores"),
}
ENGINE_OPTIONS = (
    "model",
    "head",
    "weights",
    "sdt_weights",
    "revision",
    "ray_pose",
    "engine_dir",
    "threads",
)
RUN_OPTIONS = (*ENGINE_OPTIONS, "backend", "processing_res")


def add_engine_options(parser: argparse.ArgumentParser, names: tuple[str, ...] = ENGINE_OPTIONS) -> None:
    """Add options to a verb; their values stay text until :func:`settings_of`."""
    for name in names:
        variable, text = OPTIONS[name]
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, metavar=variable, help=f"{text} (or {variable})")


def log_to_stderr() -> None:
    """Plain lines of what a worker does."""
    style = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=style, stream=sys.stderr)


def settings_of(args: argparse.Namespace, model_id: str = Settings.model_id) -> Settings:
    """The environment's settings with the given options on top; raises as ``Settings.from_env``.

    Parameters
    ----------
    model_id : str
        The model where neither names one.
    """
    given = {
        variable: value
        for name, (variable, _) in OPTIONS.items()
        if (value := getattr(args, name, None)) is not None
    }
    env = {**os.environ, **given}
    if "HEAD" in given:
        env.pop("USE_SDT_HEAD", None)
    return Settings.from_env(env, model_id)


def run_verb(verb: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a verb and return its exit code; what it raises on purpose becomes one sentence."""
    try:
        return verb(args)
    except DA3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; run 'make setup'.", file=sys.stderr)
        return SettingError.exit_code
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        name = f"{Path(error.filename).name}: " if isinstance(error.filename, str) else ""
        print(f"error: {name}{error.strerror}.", file=sys.stderr)
        return DA3Error.exit_code
    except BaseException as error:
        if not _is_interruption(error):
            raise
        print("interrupted", file=sys.stderr)
        return 130


def _is_interruption(error: BaseException | None) -> bool:
    """Whether the user stopped it; what was running may have made another error of that."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
