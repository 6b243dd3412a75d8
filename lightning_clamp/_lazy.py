"""Public names that load on first use (PEP 562), so that what needs Lightning is imported by those who want it."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def load(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """A public name of a package from the module of it that ``homes`` says.

    Raises:
        AttributeError: If there is no such name.
    """
    if name not in homes:
        offered = ", ".join(import_module(package).__all__)
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {offered}")
    return getattr(import_module(f"{package}.{homes[name]}"), name)
