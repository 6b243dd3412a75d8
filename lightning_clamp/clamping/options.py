"""The options of the methods, written out so that type checkers and command lines know them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from lightning_clamp.clamping.output_map import OutputMap


# Every key says NotRequired: command lines (jsonargparse) do not all know total=False.
class MethodOptions(TypedDict):
    """Options of all methods, of which each takes its own.

    Attributes:
        grids: For "clamp": perturbations to consider, as sides of a grid of coefficients; an empty list for none.
        outputs: For "clamp": output maps to consider; the temperature always takes part.
        max_passes: For "clamp": most passes spent on one grid.
        epochs: For "published": passes over the calibration set.
        lr: For "published": learning rate.
        momentum: For "published": momentum; unused by AdamW.
        nesterov: For "published": whether the momentum is Nesterov's.
        optimizer: For "sgd": which optimizer.
        gamma: For "published": focal exponent; None for the cross-entropy.
        loss_weight: For "published": weight of the focal loss.
        norm_weight: For "published": weight of the perturbation's norm.
        dropout: For "published": probability of dropping an entry of the perturbation in a training step.
        initial: For "published": where the perturbation starts, "random", "data-driven" or a tensor.
        initial_scale: For "published": standard deviation of the random start.
        initial_temperature: For "published": temperature to start from.
        augmentation: For "published": applied to every batch of inputs before the perturbation.
        seed: For "published": seed of all that is random.
    """

    grids: NotRequired[Sequence[int]]
    outputs: NotRequired[Sequence[OutputMap]]
    max_passes: NotRequired[int]
    epochs: NotRequired[int]
    lr: NotRequired[float]
    momentum: NotRequired[float]
    nesterov: NotRequired[bool]
    optimizer: NotRequired[Literal["sgd", "adamw"]]
    gamma: NotRequired[float | None]
    loss_weight: NotRequired[float]
    norm_weight: NotRequired[float]
    dropout: NotRequired[float]
    initial: NotRequired[Any]
    initial_scale: NotRequired[float]
    initial_temperature: NotRequired[float]
    augmentation: NotRequired[Callable[..., Any] | None]
    seed: NotRequired[int]
