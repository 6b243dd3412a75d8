"""A metric by group, drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_clamp.metrics._palette import Palette, palette_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Groups that a picture has room for.
_MOST_DRAWN = 30


def plot_groups(
    values: Tensor,
    sizes: Tensor,
    *,
    before: Tensor | None = None,
    names: Sequence[str] | None = None,
    ax: "Axes | None" = None,
    label: str = "value",
    title: str | None = None,
) -> "tuple[Figure, Axes]":
    """Draw a metric by group, the largest value on top, with the sizes of the groups.

    A point per group; with ``before`` a hollow one too, and a line from it, coloured where the value rose. Groups that
    are too small to say (nan) are listed last; of more than 30 groups the first 30 are drawn. Colours follow the
    background of the axes, light or dark.

    Args:
        values: Shape ``(n_groups,)``, nan for groups that are too small.
        sizes: Samples of each group, ``(n_groups,)``.
        before: Values to compare with, such as those of the bare network.
        names: Of the groups; by default their numbers.
        ax: Where to draw; a new figure by default.
        label: What the values are.
        title: Title of the axes.

    Returns:
        The figure and the axes.

    Raises:
        ValueError: If there are not as many names as groups.
    """
    from matplotlib import pyplot as plt

    if names is None:
        names = [f"group {group}" for group in range(len(values))]
    if len(names) != len(values):
        raise ValueError(f"`names` must have one name per group, {len(values)}, got {len(names)}.")
    after = values.reshape(-1).cpu().numpy()
    order = np.argsort(-np.nan_to_num(after, nan=-np.inf), kind="stable")[:_MOST_DRAWN]
    if ax is None:
        _, ax = plt.subplots(figsize=(5.2, 1.1 + 0.28 * len(order)), layout="constrained")
    palette = palette_of(ax)
    _draw_points(ax, after[order], None if before is None else before.reshape(-1).cpu().numpy()[order], palette)
    counts = sizes.reshape(-1).cpu().tolist()
    ax.set_yticks(range(len(order)), [f"{names[group]} ({counts[group]:,})" for group in order])
    ax.set(ylim=(len(order) - 0.4, -0.6), xlabel=label)
    ax.grid(axis="y", color=palette.share, linewidth=0.6, alpha=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    if title is not None:
        ax.set_title(title, loc="left")
    # Of a subfigure, the figure it is part of.
    return ax.figure.figure, ax


def _draw_points(ax: "Axes", after: np.ndarray, before: np.ndarray | None, palette: Palette) -> None:
    rows = np.arange(len(after))
    known = np.isfinite(after)
    if before is not None:
        for rose, colour in ((True, palette.over), (False, palette.lines[1])):
            these = known & ((after > before) == rose)
            ax.hlines(rows[these], before[these], after[these], color=colour, linewidth=2.2, zorder=2)
        hollow: dict[str, Any] = {
            "marker": "o",
            "linestyle": "none",
            "markerfacecolor": ax.get_facecolor(),
            "color": palette.lines[0],
        }
        ax.plot(before[known], rows[known], label="before", zorder=3, **hollow)
    ax.plot(
        after[known],
        rows[known],
        marker="o",
        linestyle="none",
        color=palette.lines[1],
        label="value" if before is None else "after",
        zorder=4,
    )
    shown = after[known] if before is None else np.concatenate([after[known], before[known]])
    if len(shown):
        room = 0.06 * max(float(np.ptp(shown)), 1e-3 * abs(float(shown.max())), 1e-6)
        ax.set_xlim(shown.min() - room, shown.max() + room)
    across = ax.get_yaxis_transform()
    for row in rows[~known]:
        ax.text(0.02, row, "too few to say", color=palette.lines[0], fontsize="small", va="center", transform=across)
    if before is not None:
        above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2, "borderpad": 0}
        ax.legend(frameon=False, fontsize="small", labelcolor=palette.ink, **above)
