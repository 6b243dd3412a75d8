"""Views of an image, such as its mirror image: a network is called on each, and its logits are averaged."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_clamp._batch import Inputs, tensors_of
from lightning_clamp._rows import MASKED

View: TypeAlias = Literal["hflip", "vflip"]
# The axis of (N, C, H, W) that each turns round; views are taken in this order, whatever the order they are named in.
_AXES: dict[View, int] = {"hflip": -1, "vflip": -2}
VIEWS: tuple[View, ...] = tuple(_AXES)
# Images have as many channels, at most; where the last axis is this short and no other is, it is that of channels.
_MOST_CHANNELS = 4


def check_views(views: object) -> None:
    """Refuse what is no sequence of names of views."""
    known = isinstance(views, list | tuple) and all(view in VIEWS for view in views)
    if not known or len({*views}) < len(views):  # type: ignore[misc, arg-type]
        raise ValueError(f"`views` must be a sequence of names among {VIEWS}, each once, got {views!r}.")


def image_of(inputs: Inputs) -> Tensor:
    """The one tensor that the inputs consist of.

    Raises:
        ValueError: If there are several.
    """
    image, *others = tensors_of(inputs)
    if others:
        raise ValueError(
            f"`views` turn one image round, and the input of a batch has {1 + len(others)} parts: leave `views` out."
        )
    return image


def mean_over_views(
    logits: Tensor, images: Tensor, again: Callable[[Tensor], Tensor], views: Sequence[View], *, one_logit: bool
) -> Tensor:
    """Mean of the logits of images as they are and of their views.

    That of the log-probabilities is the same but for a number that all classes of a row share, which no softmax sees.
    What is masked in one view, of probability 0 there, stays masked.

    Args:
        logits: Of the images as they are.
        images: Floats, shape ``(N, C, H, W)``.
        again: From views of these images to their logits.
        views: Which views, beside the images as they are.
        one_logit: Whether there is one logit per position, which may then be ``(N, H, W)``.

    Raises:
        ValueError: If these are no images, or outputs per pixel are of another size.
    """
    _check_images(images)
    total = lowest = logits
    for view in (view for view in VIEWS if view in views):
        seen = _back(again(images.flip(_AXES[view])), _AXES[view], images, one_logit)
        total, lowest = total + seen, torch.minimum(lowest, seen)
    # The mean of a mask and of a score may lie above what counts as a mask.
    return (total / (1 + len(views))).where(lowest > MASKED, lowest)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"`views` turn images round, floats of shape (N, C, H, W), and the input is {images.dtype} of shape "
            f"{tuple(images.shape)}: leave `views` out."
        )
    # An export may leave the size of images open, and this would close it.
    if not torch.compiler.is_compiling() and images.shape[3] <= _MOST_CHANNELS < min(images.shape[1:3]):
        raise ValueError(
            "`views` turn images round, floats of shape (N, C, H, W), and the input seems to have its channels last, "
            f"{tuple(images.shape)}: let the network take images.permute(0, 3, 1, 2), or leave `views` out."
        )


def _back(logits: Tensor, axis: int, images: Tensor, one_logit: bool) -> Tensor:
    """Logits of a view, those of each pixel at its place in the images as they are; ``(N, C)`` has no places."""
    places = logits.shape[1:] if one_logit and logits.ndim == 3 else logits.shape[2:]
    if all(side == 1 for side in places):
        return logits
    if places != images.shape[2:]:
        raise ValueError(
            f"`views` turn outputs per pixel back, and logits of shape {tuple(logits.shape)} are not of the images' "
            f"size {tuple(images.shape[2:])}: return logits of that size, or leave `views` out."
        )
    return logits.flip(axis)
