"""Versions of what a run was made with."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def package_versions(names: tuple[str, ...] = ("torch", "torchvision", "numpy", "pyarrow")) -> dict[str, str]:
    """Versions of Python and of the named packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def code_version() -> str:
    """Commit of this code, with ``-dirty`` where files differ from it; the package's version where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return version("path-fm")
