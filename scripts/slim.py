"""Make an image's packages smaller and faster to import: ``slim.py strip SITE``, ``slim.py compile``.

``strip`` removes from a folder of packages the files that serving never reads. ``compile [MODULE ...]``
writes the bytecode of the modules that serving imports, Python's own included, and of no others: the
base image contains no bytecode, and with a read-only root no start could keep what it compiled.
"""

from __future__ import annotations

import importlib
import py_compile
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

# Sources of extension modules, type stubs, and what Python or pip leaves behind.
SUFFIXES = {".pyx", ".pxd", ".pxi", ".cpp", ".cc", ".c", ".h", ".hpp", ".cuh", ".pyi", ".a", ".pyc"}
FOLDERS = {"tests", "test", "__pycache__", "sboms"}
# Parts of packages that serving does not need.
PARTS = (
    "PIL/_imagingcms*",  # converts colors by ICC profiles, with a library of pillow.libs
    "PIL/_imagingft*",  # draws text, with two libraries of pillow.libs
    "PIL/_imagingtk*",  # shows images in windows
    "aiohttp/_websocket/reader_c*",  # compiled twin of reader_py
    "botocore/data/*/",  # descriptions of cloud services, except the one in KEPT
    "boto3/data/*/",
    "boto3/examples",
    "cuda/bindings/_bindings/cynvrtc*",  # CUDA libraries that are not in the images
    "cuda/bindings/_internal/*nv*",
    "cuda/bindings/_internal/cufile*",
    "cuda/bindings/*cufile*",
    "cuda/bindings/*nvjitlink*",
    "cuda/bindings/*nvrtc*",
    "cuda/bindings/*nvvm*",
    "cv2/data/*.xml",  # cascades that find faces
    "hf_xet",  # a second way to download; huggingface_hub uses HTTP without it
    "hf_xet-*",
    "numpy/distutils",
    "numpy/f2py",
    "onnxruntime/capi/libonnxruntime.so*",  # for programs in C; the Python module contains its own copy
    "onnxruntime/backend",
    "onnxruntime/datasets",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "pillow.libs/libfreetype*",
    "pillow.libs/libharfbuzz*",
    "pillow.libs/liblcms2*",
    "yaml/_yaml*",  # compiled twin of PyYAML's loader; serving reads no YAML
)
KEPT = {"s3"}
# What each way of serving imports at its start or later.
ENTRIES = (
    "da3_runtime.__main__",
    "da3_runtime.handler",
    "da3_runtime.serve.runpod_worker",
    "da3_runtime.serve.healthcheck",
    "da3_runtime.serve.http_server",
    "da3_runtime.inference.estimator",
    "da3_runtime.output.bucket",
    "da3_runtime.image.fetch",
    "huggingface_hub",
    "onnxruntime",
    "cuda.bindings.runtime",
    "runpod.serverless.modules.rp_fastapi",
    "runpod.serverless.utils.rp_ssrf",
    "boto3.s3.transfer",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
)
PLAN_LIBRARIES = ("tensorrt_rtx", "tensorrt_lean_bindings")  # the image has one of them


def strip(site: Path) -> None:
    """Remove the files that serving never reads from a folder of installed packages."""
    for path in sorted(site.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if path.name in FOLDERS:
                shutil.rmtree(path)
        elif path.suffix in SUFFIXES:
            path.unlink()
    for pattern in PARTS:
        for path in sorted(site.glob(pattern)):
            if path.name in KEPT:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def compile_imported(more: Sequence[str] = ()) -> None:
    """Write the bytecode of every module that serving imports; imports do not check the source."""
    importlib.import_module("da3_runtime.util.runpod_sdk").import_sdk()
    libraries = [name for name in PLAN_LIBRARIES if find_spec(name) is not None]
    for name in (*ENTRIES, *libraries, *more):
        importlib.import_module(name)
    for module in list(sys.modules.values()):
        source = getattr(module, "__file__", None)
        # Some of PyTorch's modules are made in memory and have a `__file__` that does not exist.
        if source and source.endswith(".py") and Path(source).is_absolute():
            py_compile.compile(
                source, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["strip", site]:
            strip(Path(site))
        case ["compile", *more]:
            sys.dont_write_bytecode = True  # compile_imported writes it
            compile_imported(more)
        case _:
            sys.exit("usage: slim.py strip SITE | slim.py compile [MODULE ...]")
