"""Versions of what a run was made with, and how to get what is missing."""

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


def how_to_install(extra: str) -> str:
    """The end of a sentence on a package that is missing: what installs an optional part of Path-FM."""
    return f"PATHFM_EXTRAS={','.join(dict.fromkeys(('dev', 'slides', extra)))} ./install.sh installs it"


def code_version() -> str:
    """Commit of this code, with ``-dirty`` where files differ from it; the package's version where git has none of it,
    as where the package is installed into a folder of another repository.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")
    return version("path-fm")
