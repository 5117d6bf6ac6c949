"""Which extra of the distribution installs a missing module."""

from __future__ import annotations

EXTRAS = {
    "onnxruntime": "cpu",
    "cuda": "gpu",
    "tensorrt_rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt-lean",
    "tensorrt_lean": "tensorrt-lean",
    "torch": "eager",
    "safetensors": "eager",
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "requests": "serve",
    "runpod": "runpod",
}


def not_installed(module: str, extra: str | None = None) -> str:
    """One sentence, without its full stop: the module is missing, and the command that installs it.

    Parameters
    ----------
    extra : str | None
        The extra that installs it; None for the one in :data:`EXTRAS`.
    """
    name = module.partition(".")[0]
    extra = extra or EXTRAS.get(name)
    package = f"da3-runtime[{extra}]" if extra else name.replace("_", "-")
    return f'{name} is not installed: pip install "{package}"'
