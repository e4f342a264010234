"""Versions of what a run was made with."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def package_versions(names: tuple[str, ...] = ("torch", "torchvision", "numpy", "pyarrow")) -> dict[str, str]:
    """Versions of Python and of the named packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
