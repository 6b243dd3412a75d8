"""The wording of refusals: labels and options out of range."""

import math
import re
from collections.abc import Mapping
from numbers import Real

from torch import Tensor


class OptionError(ValueError):
    """A refusal that names options, as ```clip``` or ``clip=``: a class around the function may call them otherwise."""

    def renamed(self, names: Mapping[str, str]) -> "OptionError":
        """The same refusal where options are called as ``names`` has them."""
        return OptionError(renamed(str(self), names))


def renamed(message: str, names: Mapping[str, str]) -> str:
    """A sentence that names options, where those in ``names`` are called otherwise."""
    return re.sub(r"(?<=`)\w+(?=`)|\b\w+(?==)", lambda found: names.get(found[0], found[0]), message)


def counted(number: int, thing: str, things: str = "") -> str:
    """A number of things, as in "1 pass" and "2 passes"."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def check_package(*things: object) -> None:
    """Refuse classes and objects of Lightning's twin package, which are none of Lightning's own.

    Raises:
        TypeError: If there is one.
    """
    for thing in things:
        kind = thing if isinstance(thing, type) else type(thing)
        if any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in kind.__mro__):
            raise TypeError(
                f"{kind.__name__} comes from pytorch_lightning, a package with classes of its own: write `import "
                "lightning.pytorch as pl` for `import pytorch_lightning as pl`; the API is the same."
            )


def check_made(network: object) -> None:
    """Refuse the class of a network in the place of a network.

    Raises:
        TypeError: If it is one.
    """
    if isinstance(network, type):
        name = network.__name__
        raise TypeError(f"A network is calibrated, and not its class; got the class {name}: pass one, {name}(...).")


def check_range(target: Tensor, classes: int, way_out: str = "") -> None:
    """Refuse class indices out of range; ``way_out`` says what to do about it.

    Raises:
        ValueError: If an index is not in ``[0, classes)``.
    """
    if not len(target):
        return
    low, high = (int(end) for end in target.aminmax())
    if low < 0 or high >= classes:
        raise OptionError(f"Targets must lie in [0, {classes - 1}], got {low if low < 0 else high}.{way_out}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Refuse an option below ``least``, nan, or no number."""
    if not _is_number(value) or not value >= least:
        raise OptionError(f"`{name}` must be at least {least}, got {value!r}.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Refuse an option outside ``[low, high]``, or no number."""
    if not _is_number(value) or not low <= value <= high:
        raise OptionError(f"`{name}` must lie in [{low}, {high}], got {value!r}.")


def _is_number(value: object) -> bool:
    # What almost all are is found ten times as fast.
    return type(value) is float or isinstance(value, Real)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse an option that is none of ``choices``."""
    if value not in choices:
        raise OptionError(f"`{name}` must be one of {choices}, got {value!r}.")


def check_whole(name: str, value: object, *, least: int) -> None:
    """Refuse an option that is no whole number, or one below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def check_number(
    name: str, value: object, *, above: float | None = None, least: float | None = None, below: float | None = None
) -> None:
    """Refuse an option that is no finite number, or one out of range."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(value, int | float):
        right = right and (above is None or value > above) and (least is None or value >= least)
        right = right and (below is None or value < below)
    if not right:
        limits = {"above": above, "at least": least, "below": below}
        words = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        raise OptionError(f"`{name}` must be a number{f' {words}' if words else ''}, got {value!r}.")
