r"""Smooth perturbations: a few coefficients per channel, spread over the image by bicubic interpolation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Grid:
    """An r×r grid of coefficients per channel, and the images they span.

    Attributes:
        size: r. 1 is one number per channel (or per feature of a flat input).
        shape: Shape of one input, channel first: ``(C, H, W)``, ``(C, L)``, ``(D,)``.
        rows: What a coefficient adds to the positions of its channel is the product of two: a number for each row of
            the image, ``(r, H)``, float64,
        columns: and one for each column, ``(r, W)``. What is no image counts as one row.
    """

    size: int
    shape: tuple[int, ...]
    rows: Tensor
    columns: Tensor

    @property
    def n_coefficients(self) -> int:
        """Number of coefficients, channels times r²."""
        return self.channels * self.size**2

    @property
    def channels(self) -> int:
        """Number of channels; 1 for inputs without any axis."""
        return self.shape[0] if self.shape else 1

    def on(self, device: torch.device | None) -> "Grid":
        """The same grid on a device; None for where it is."""
        return replace(self, rows=self.rows.to(device), columns=self.columns.to(device))

    def image(self, coefficients: Tensor) -> Tensor:
        """The perturbation with these coefficients ``(n_coefficients,)``, shaped like one input, float64."""
        corners = coefficients.reshape(self.channels, self.size, self.size)
        return (self.rows.to(corners).T @ corners @ self.columns.to(corners)).reshape(self.shape)


def project(gradient: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Gradients in the coefficients of every grid, ``(N, n_coefficients)`` float64, all grids in one go.

    Over axes between, such as the positions of a sequence, they are summed, as the perturbation is the same there.

    Args:
        gradient: Input gradients, ``(N, ..., *shape)``.
        grids: Grids of the same shape, at least one.
    """
    n, between = len(gradient), gradient.ndim - 1 - len(grids[0].shape)
    gradient = gradient.flatten(1, between).sum(1, dtype=torch.float64) if between else gradient.double()
    rows = torch.cat([grid.rows for grid in grids]).to(gradient)
    columns = torch.cat([grid.columns for grid in grids]).to(gradient)
    (r, height), width = rows.shape, columns.shape[1]
    of_rows = (gradient.reshape(-1, width) @ columns.T).reshape(-1, height, r).mT
    corners = of_rows @ rows.T  # (N * channels, columns, rows) of every grid with every other
    ends = accumulate(grid.size for grid in grids)
    own = [slice(end - grid.size, end) for grid, end in zip(grids, ends, strict=True)]
    return [corners[:, part, part].mT.reshape(n, -1) for part in own]


def make_grid(size: int, shape: Sequence[int]) -> Grid:
    """Build the grid of ``size`` for inputs of ``shape``.

    Args:
        size: r, at least 1. Above 1 it needs an image, ``(C, H, W)`` with H and W at least r.
        shape: Shape of one input, without the batch axis.

    Raises:
        ValueError: If inputs of this shape have no such grid; :func:`available_sizes` tells which they have.
    """
    shape = tuple(shape)
    if size not in available_sizes([size], shape):
        raise ValueError(f"Inputs of shape {shape} have no grid of size {size}: only images of at least that size do.")
    return Grid(size, shape, *(_along(size, side) for side in _sides(shape)))


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of an image; all that is no image is one row."""
    return (shape[1], shape[2]) if len(shape) == 3 else (1, torch.Size(shape[1:]).numel())


def _along(size: int, side: int) -> Tensor:
    """Bicubic interpolation along one axis, ``(size, side)``: of each coefficient, to every position."""
    if size == 1:
        return torch.ones(1, side, dtype=torch.float64)
    corners = torch.eye(size, dtype=torch.float64).reshape(size, 1, 1, size)
    return F.interpolate(corners, size=(1, side), mode="bicubic", align_corners=False).reshape(size, side)


def available_sizes(sizes: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Those of ``sizes`` that inputs of ``shape`` have a grid for: all up to the side of an image, else only 1."""
    side = min(shape[1:]) if len(shape) == 3 else 1
    return [size for size in sizes if 1 <= size <= side or size == 1]


def shifted(inputs: Tensor, perturbation: Tensor | None) -> Tensor:
    """Add a perturbation ``(*shape)`` to every input ``(N, ..., *shape)``; the dtype of the inputs is kept.

    Raises:
        TypeError: If there is a perturbation and the inputs are no floats: it would be rounded away.
    """
    if perturbation is None:
        return inputs
    if not inputs.is_floating_point():
        raise TypeError(f"The inputs are {inputs.dtype}, and a perturbation needs float inputs: convert them first.")
    return (inputs + perturbation.to(inputs.device)).to(inputs.dtype)
