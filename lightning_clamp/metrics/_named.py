"""Curves to be drawn, with their names."""

from collections.abc import Mapping
from typing import TypeVar

Curve = TypeVar("Curve")


def named_curves(
    curves: Curve | list[Curve] | Mapping[str, Curve], kind: type[Curve], function: str
) -> dict[str, Curve]:
    """One curve without a name, or several by name; those of a list are steps.

    Args:
        curves: As the function that draws takes them.
        kind: What each must be.
        function: Its name, for errors.

    Raises:
        TypeError: If something is no such curve.
        ValueError: If there is none.
    """
    if isinstance(curves, kind):
        return {"": curves}
    word = f"a {kind.__name__}, a list of them or a dict of them by name"
    way_out = "; the compute() of a diagram's metric gives its curve"
    if isinstance(curves, Mapping):
        named = dict(curves)
    elif isinstance(curves, list):
        named = {f"step {index}": curve for index, curve in enumerate(curves)}
    else:
        raise TypeError(f"`{function}` draws {word}, got {type(curves).__name__}{way_out}.")
    if not named:
        raise ValueError(f"`{function}` needs at least one curve, got none.")
    for name, curve in named.items():
        if not isinstance(curve, kind):
            raise TypeError(f"`{function}` draws {word}, got {type(curve).__name__} as {name!r}{way_out}.")
    return named
