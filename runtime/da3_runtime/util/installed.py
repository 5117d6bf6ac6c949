"""Checks whether the optional packages that a feature needs are installed, without importing them."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed(module: str) -> bool:
    """Whether a Python module can be found. Only its parent packages are imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is not installed
        return False


def missing_package(module: str, extra: str, package: str | None = None) -> str | None:
    """Why a feature cannot run: the missing package and the extra that installs it.

    Parameters
    ----------
    module : str
        Python module that the feature imports.
    extra : str
        Extra of ``da3-runtime`` that installs it.
    package : str | None
        Name to report, if it is not the module's.

    Returns
    -------
    str | None
        None if the module is installed.
    """
    if is_installed(module):
        return None
    return f'{package or module} is not installed (pip install "da3-runtime[{extra}]")'
