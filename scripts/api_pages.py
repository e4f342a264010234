"""API pages from the docstrings: ``scripts/api_pages.py FOLDER``, by pdoc (extra ``docs``); a warning ends it.

Packages that list their names list their modules too while this runs, which pdoc passes over otherwise; and names that
are loaded at first use are loaded before, since it looks at what is there.
"""

import argparse
import sys
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules, walk_packages

import dinov2


def load_names() -> None:
    """Give every module the names that it lists, and let packages list their modules."""
    found = walk_packages(dinov2.__path__, f"{dinov2.__name__}.")
    for module in map(import_module, (info.name for info in found if not info.name.endswith(".__main__"))):
        if not hasattr(module, "__all__"):
            continue
        for name in module.__all__:
            setattr(module, name, getattr(module, name))
        modules = [info.name for info in iter_modules(getattr(module, "__path__", ())) if info.name != "__main__"]
        module.__all__ = [*module.__all__, *(name for name in modules if name not in module.__all__)]


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the pages")
    args = parser.parse_args()
    try:
        import pdoc
    except ImportError:
        parser.error("pdoc is not installed; PATHFM_EXTRAS=dev,slides,docs ./install.sh installs it.")
    load_names()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.render.configure(docformat="google")
        pdoc.pdoc(dinov2.__name__, output_directory=args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
