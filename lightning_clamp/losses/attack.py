"""Projected gradient ascent on the cross-entropy of the inputs, in units of the images before normalisation."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_clamp._checks import OptionError, check_at_least, check_choice, check_whole
from lightning_clamp.losses._modes import MODES, Mode

Norm: TypeAlias = Literal["linf", "l2"]
_NORMS: tuple[Norm, ...] = ("linf", "l2")
# Means and deviations are often given with two digits: so far an image may lie outside its range, as a share of it.
_SLACK = 0.01


class Attack(NamedTuple):
    """How the inputs are moved.

    Attributes:
        epsilon: Radius of the ball around each input, in units of the image (8/255 for images in [0, 1]).
        step_size: Length of a step, in the same units.
        steps: Number of steps.
        norm: ``"linf"``: signed steps, every pixel within ``epsilon``. ``"l2"``: steps along the gradient, the whole
            input within ``epsilon``.
        mean: What the data pipeline subtracts, one number or one per channel (axis 1).
        std: What it then divides by, one number or one per channel (axis 1).
        clip: Range of the images before normalisation, None for inputs without one.
        mode: Mode of the network while it is attacked.
    """

    epsilon: float
    step_size: float
    steps: int
    norm: Norm
    mean: float | Sequence[float]
    std: float | Sequence[float]
    clip: tuple[float, float] | None
    mode: Mode

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: If a number is negative, ``std`` is not positive, or a name is unknown.
        """
        check_at_least("epsilon", self.epsilon, 0)
        check_at_least("step_size", self.step_size, 0)
        check_whole("steps", self.steps, least=0)
        check_choice("norm", self.norm, _NORMS)
        check_choice("attack_mode", self.mode, MODES)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if not _are_numbers(value):
                raise OptionError(f"`{name}` must be a finite number, or one for each channel, got {value!r}.")
        if any(value <= 0 for value in ([self.std] if isinstance(self.std, float | Real) else self.std)):
            raise OptionError(f"`std` must be positive, got {self.std}.")
        if self.clip is not None and not (_are_numbers(self.clip) and _rises(self.clip)):
            raise OptionError(f"`clip` must be two numbers, the smaller first, or None, got {self.clip!r}.")

    def __call__(self, loss: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Move ``inputs`` so that ``loss``, a scalar, rises; they start at their place, and come back detached.

        Raises:
            ValueError: If they lie outside the clip range, or have other channels than the normalisation.
        """
        # In units of the image, and in float32: a step is below the rounding of bfloat16.
        wide = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
        mean, std = (_per_channel(value, wide) for value in (self.mean, self.std))
        images = wide * std + mean
        self._check_range(images, torch.finfo(inputs.dtype).eps)
        moved = images
        for _ in range(self.steps):
            point = ((moved - mean) / std).to(inputs.dtype).requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(point), point)
            with torch.no_grad():
                shift = moved - images + self.step_size * self._direction(gradient.to(wide.dtype) / std)
                moved = images + self._projected(shift)
                if self.clip is not None:
                    moved = moved.clamp(*self.clip)
        return ((moved - mean) / std).to(inputs.dtype)

    def _direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign() if self.norm == "linf" else gradient / _norms(gradient)

    def _projected(self, shift: Tensor) -> Tensor:
        if self.norm == "linf":
            return shift.clamp(-self.epsilon, self.epsilon)
        return shift * (self.epsilon / _norms(shift)).clamp_max(1)

    def _check_range(self, images: Tensor, rounding: float) -> None:
        """Refuse images outside the clip range, which the clipping itself would move."""
        # While a CUDA graph is recorded, no number can be read.
        if self.clip is None or (images.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        low, high = self.clip
        slack = max(_SLACK, 8 * rounding) * (high - low)
        if bool((images < low - slack).any() | (images > high + slack).any()):
            raise OptionError(
                f"Inputs of the range [{images.amin():.3g}, {images.amax():.3g}] lie outside clip=({low:g}, {high:g}): "
                "pass the `mean` and `std` of your normalisation, or clip=None for inputs without a range."
            )


def _are_numbers(value: object) -> bool:
    """Whether an option is a finite number, or several."""
    several = [value] if isinstance(value, Real) else value
    if isinstance(several, str) or not isinstance(several, Iterable):
        return False
    return all(isinstance(one, Real | Tensor) and math.isfinite(one) for one in several)


def _rises(ends: object) -> bool:
    return isinstance(ends, Sequence) and len(ends) == 2 and ends[0] < ends[1]


def _per_channel(value: float | Sequence[float], inputs: Tensor) -> Tensor:
    """``value`` in a shape that fits beside ``inputs``, with the channels on axis 1."""
    if isinstance(value, float | Real):
        return inputs.new_full((), value)
    if inputs.ndim < 2 or len(value) != inputs.shape[1]:
        raise OptionError(
            f"`mean` or `std` holds {len(value)} numbers, one per channel, and inputs of shape {tuple(inputs.shape)} "
            f"have no axis 1 of {len(value)} channels."
        )
    # Made where the inputs are: a copy from the CPU cannot be part of a CUDA graph.
    channels = torch.stack([inputs.new_full((), number) for number in value])
    return channels.reshape(-1, *[1] * (inputs.ndim - 2))


def _norms(values: Tensor) -> Tensor:
    """Length of each item, not 0, in a shape that fits beside ``values``."""
    lengths = torch.linalg.vector_norm(values.flatten(1), dim=1).clamp_min(torch.finfo(values.dtype).tiny)
    shaped: Tensor = lengths.reshape(-1, *[1] * (values.ndim - 1))
    return shaped
