"""Tables of exchangeable parts: a name in a configuration, and where the code for it is."""

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any


class Registry(Mapping[str, Any]):
    """Parts of one kind by name; the module of a part is imported when the part is first asked for.

    A configuration can therefore be checked against the names without importing torch, and what a run does not
    use costs it nothing. A name of the form ``package.module:attribute`` needs no entry: code that lives outside
    this package is used by naming it. ``targets`` are ``module:attribute`` by name; messages call a part a ``kind``.
    """

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        self.kind = kind
        self._targets = dict(targets)

    def __getitem__(self, name: str) -> Any:
        """Import and return a part.

        Raises KeyError, with `problem`, where there is none of the name; ImportError where its module is missing.
        """
        if self.problem(name):
            raise KeyError(self.problem(name))
        module, _, attribute = self._targets.get(name, name).partition(":")
        try:
            return getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if name in self._targets:
                raise
            missing = f"module {error.name!r} is not there to be imported; install it or add its folder to PYTHONPATH"
            raise ImportError(f"The {self.kind} {name!r} cannot be loaded: {missing}.", name=error.name) from error
        except AttributeError as error:
            raise ImportError(f"The {self.kind} {name!r} cannot be loaded ({error}).", name=module) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.problem(name) is None

    def problem(self, name: str) -> str | None:
        """One sentence on why a name stands for nothing; None where it stands for a part. Imports nothing."""
        module, colon, attribute = name.partition(":")
        if name in self._targets or (colon and attribute.isidentifier() and module.replace(".", "").isidentifier()):
            return None
        near = difflib.get_close_matches(name, self._targets, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(self._targets)}."
        return f"There is no {self.kind} {name!r}; {hint}"
