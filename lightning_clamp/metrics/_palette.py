"""Colours of the reliability diagram, which stay apart for the colour-blind, on light and on dark axes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


class Palette(NamedTuple):
    """What each thing is drawn in.

    Attributes:
        accuracy: Bars of the accuracy.
        over: The gap of a bin that is too sure.
        under: The gap of a bin that is not sure enough.
        share: Where the data are.
        ink: Lines and words.
        lines: One for each of several curves.
    """

    accuracy: str
    over: str
    under: str
    share: str
    ink: str
    lines: tuple[str, ...]

    def of_lines(self, count: int) -> "Sequence[str | NDArray[np.float64]]":
        """A colour for each of several curves, in order; of many, along a scale."""
        from matplotlib import colormaps

        if count <= len(self.lines):
            return self.lines[:count]
        return list(colormaps["viridis"](np.linspace(0.15, 0.85, count)))


_ON_LIGHT = Palette(
    "#a9c4dc", "#d1495b", "#2a9d8f", "#a9b4bf", "#1a1a1a",
    ("#6b6b6b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b"),
)  # fmt: skip
_ON_DARK = Palette(
    "#3b6285", "#e0657a", "#4fc4b3", "#6d7885", "#f2f2f2",
    ("#b4b4b4", "#56b4e9", "#ff8c42", "#2fd0a0", "#e59bc6", "#f0e442"),
)  # fmt: skip


def palette_of(ax: "Axes") -> Palette:
    """The palette that stands out from the background of the axes."""
    from matplotlib.colors import to_rgb

    luminance = float(np.dot(to_rgb(ax.get_facecolor()), (0.299, 0.587, 0.114)))
    return _ON_LIGHT if luminance > 0.5 else _ON_DARK
