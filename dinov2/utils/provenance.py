"""Versions of what a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def package_versions(names: tuple[str, ...] = ("torch", "torchvision", "numpy", "pyarrow")) -> dict[str, str]:
    """Versions of Python and of the named packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
