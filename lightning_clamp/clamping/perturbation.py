r"""Smooth perturbations: a few coefficients per channel, spread over the image by bicubic interpolation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Grid:
    """An r×r grid of coefficients per channel, and the images they span.

    Attributes:
        size: r. 1 is one number per channel (or per feature of a flat input).
        shape: Shape of one input, channel first: ``(C, H, W)``, ``(C, L)``, ``(D,)``.
        basis: What each coefficient adds to the positions of its channel, ``(r * r, positions)``, float64.
    """

    size: int
    shape: tuple[int, ...]
    basis: Tensor

    @property
    def n_coefficients(self) -> int:
        """Number of coefficients, channels times r²."""
        return self.channels * len(self.basis)

    @property
    def channels(self) -> int:
        """Number of channels; 1 for inputs without any axis."""
        return self.shape[0] if self.shape else 1

    def image(self, coefficients: Tensor) -> Tensor:
        """The perturbation with these coefficients ``(n_coefficients,)``, shaped like one input, float64."""
        return (coefficients.reshape(self.channels, -1) @ self.basis.to(coefficients)).reshape(self.shape)

    def project(self, gradient: Tensor) -> Tensor:
        """Gradients in the coefficients, ``(N, n_coefficients)`` float64, from input gradients ``(N, ..., *shape)``.

        Over axes between, such as the positions of a sequence, they are summed, as the perturbation is the same there.
        """
        shared = gradient[:, None].flatten(1, -1 - len(self.shape)).sum(1)
        flat = shared.reshape(len(gradient), self.channels, -1).double()
        return (flat @ self.basis.to(flat).T).flatten(1)


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
    spatial = shape[1:]
    if size == 1:
        return Grid(1, shape, torch.ones(1, torch.Size(spatial).numel(), dtype=torch.float64))
    corners = torch.eye(size * size, dtype=torch.float64).reshape(-1, 1, size, size)
    basis = F.interpolate(corners, size=spatial, mode="bicubic", align_corners=False)
    return Grid(size, shape, basis.flatten(1))


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
