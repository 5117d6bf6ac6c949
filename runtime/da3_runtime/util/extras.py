"""Which extra of da3-runtime installs a missing package, found without importing anything."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "cuda": "gpu",
    "tensorrt_rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt-lean",
    "tensorrt_lean": "tensorrt-lean",
    "torch": "eager",
    "safetensors": "eager",
    "fastapi": "serve",
    "fastapi_swagger": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "orjson": "serve",
    "prometheus_client": "serve",
    "python_multipart": "serve",
    "aiohttp": "runpod",
    "pyarrow": "ray",
    "ray": "ray",
    "pi_heif": "heif",
    "av": "video",
    "botocore": "runpod",
    "certifi": "runpod",
    "runpod": "runpod",
    "urllib3": "runpod",
    "yarl": "runpod",
}
# Packages whose module has another name.
PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "isal_zlib": "isal"}


def not_installed(module: str, extra: str | None = None) -> str:
    """A sentence without its period: the module is not installed, and the command that installs it.

    Parameters
    ----------
    extra : str | None
        The extra that installs it; None for the one in :data:`EXTRAS`.
    """
    name = module.partition(".")[0]
    extra = extra or EXTRAS.get(name)
    package = f"da3-runtime[{extra}]" if extra else PACKAGES.get(name, name.replace("_", "-"))
    return f'{name} is not installed: pip install "{package}"'


def is_installed(module: str) -> bool:
    """Whether a Python module can be found. Only its parent packages are imported.

    A module whose parent package fails on import counts as installed: importing it gives the reason.
    """
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is not installed
        return False
    except Exception:
        return True


def missing_package(module: str, extra: str | None = None, package: str | None = None) -> str | None:
    """The sentence of :func:`not_installed`; None if the module is installed.

    Parameters
    ----------
    module : str
        Python module that the feature imports.
    package : str | None
        Name to report, if it is not the module's.
    """
    return None if is_installed(module) else not_installed(package or module, extra)
