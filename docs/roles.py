"""A griffe extension: the roles of the docstrings (:func:`x`, :math:`x`) become links and formulas of the site."""

import re
from collections.abc import Iterator
from typing import Any

from griffe import Extension, Module, Object
from latex2mathml.converter import convert

ROLE = re.compile(r":(\w+):`~?\.?([^`]+)`")


class Roles(Extension):
    """Rewrite all docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Rewrite them; a name that is written without its module is looked up in the same class, then everywhere."""
        objects = list(_below(pkg))
        objects.sort(key=lambda thing: thing.parent.is_module)  # so that `accuracy` is the function, and no attribute
        paths = {thing.name: thing.path for thing in objects}
        paths |= {f"{thing.parent.name}.{thing.name}": thing.path for thing in objects if thing.parent is not None}
        for thing in (pkg, *objects):
            if thing.docstring is not None:
                owner = thing if thing.is_class else thing.parent
                text = ROLE.sub(
                    lambda found, owner=owner: _markdown(*found.groups(), owner, paths), thing.docstring.value
                )
                thing.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _below(thing: Object) -> Iterator[Object]:
    for member in thing.members.values():
        if not member.is_alias:
            yield member
            yield from _below(member)


def _markdown(role: str, text: str, owner: Object | None, paths: dict[str, str]) -> str:
    if role == "math":
        return convert(text).replace("\n", "")
    parts = text.split(".")
    keys = (f"{owner.name}.{parts[-1]}" if owner else "", ".".join(parts[-2:]), parts[-1])
    path = next((paths[key] for key in keys if key in paths), text)
    # Optional: what has no page of its own stays plain code.
    return f'<autoref optional identifier="{path}"><code>{parts[-1]}</code></autoref>'
