"""The losses as modules, ``criterion(logits, target)``: the options of each are those of its function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_clamp._rows import Task
from lightning_clamp.losses._modes import Mode
from lightning_clamp.losses._positions import Reduction
from lightning_clamp.losses.attack import Norm
from lightning_clamp.losses.batch_statistics import dca_loss, mdca_loss, mmce_loss
from lightning_clamp.losses.cpc import cpc_loss
from lightning_clamp.losses.focal import brier_loss, dual_focal_loss, flsd_loss, focal_loss
from lightning_clamp.losses.label_perturbation import Kind, sc_bce_loss
from lightning_clamp.losses.margin_aware import margin_aware_loss
from lightning_clamp.losses.regularizers import (
    Reference,
    acls_loss,
    entropy_penalty_loss,
    label_smoothing_loss,
    mbls_loss,
)


@dataclass(eq=False, repr=False, kw_only=True)
class _Loss(nn.Module):
    """A function with its options, which are the fields; they are checked when it is made."""

    ignore_index: int | None = None
    reduction: Reduction = "mean"

    function: ClassVar[Callable[..., Tensor]]

    def __new__(cls, *_: Any, **__: Any) -> Self:
        # A module has to be one before it has attributes, which the __init__ of a dataclass sets first.
        self = super().__new__(cls)
        nn.Module.__init__(self)
        return self

    def __post_init__(self) -> None:
        """Refuse options out of range, by a batch of no samples."""
        self.option_names = tuple(field.name for field in fields(self))
        self(*self.no_samples())

    def no_samples(self) -> tuple[Any, ...]:
        """A batch of none; on the CPU also where modules are made on another device."""
        return torch.zeros(0, 2, device="cpu"), torch.zeros(0, dtype=torch.long, device="cpu")

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in self.option_names}

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch."""
        return type(self).function(logits, target, **self.options())

    def extra_repr(self) -> str:
        """The options that are not the default."""
        defaults = {field.name: field.default for field in fields(self)}
        given = {name: value for name, value in self.options().items() if value is not defaults[name]}
        words = {name: f"{len(v)} numbers" if isinstance(v, Tensor) else repr(v) for name, v in given.items()}
        return ", ".join(f"{name}={word}" for name, word in words.items() if word != repr(defaults[name]))


@dataclass(eq=False, repr=False, kw_only=True)
class _TaskLoss(_Loss):
    task: Task = "multiclass"

    def no_samples(self) -> tuple[Any, ...]:
        """A batch of none, in the layout of the task."""
        logits, target = super().no_samples()
        layouts = {"multiclass": (logits, target), "binary": (logits[:, 0], target)}
        return layouts.get(self.task, (logits, logits))


@dataclass(eq=False, repr=False, kw_only=True)
class _WeightedLoss(_TaskLoss):
    """The weights of the classes go where the module goes, and not into its ``state_dict``."""

    weight: Tensor | None = None

    def __new__(cls, *_: Any, **__: Any) -> Self:
        self = super().__new__(cls)
        self.register_buffer("weight", None, persistent=False)
        return self

    def no_samples(self) -> tuple[Any, ...]:
        """A batch of none, with the classes that have weights, where they are."""
        logits, target = super().no_samples()
        if self.weight is None:
            return logits, target
        if self.task == "multiclass":
            logits = logits.new_zeros(0, max(2, self.weight.numel()))
        return logits.to(self.weight.device), target.to(self.weight.device)


# A default on the class would stand before the buffer.
del _WeightedLoss.weight


@dataclass(eq=False, repr=False, kw_only=True)
class LabelSmoothingLoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.label_smoothing_loss` as a module."""

    function = staticmethod(label_smoothing_loss)
    alpha: float = 0.05


@dataclass(eq=False, repr=False, kw_only=True)
class EntropyPenaltyLoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.entropy_penalty_loss` as a module."""

    function = staticmethod(entropy_penalty_loss)
    alpha: float = 0.1
    reference: Reference = "code"


@dataclass(eq=False, repr=False, kw_only=True)
class MbLSLoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.mbls_loss` as a module."""

    function = staticmethod(mbls_loss)
    alpha: float = 0.1
    margin: float = 10.0


@dataclass(eq=False, repr=False, kw_only=True)
class ACLSLoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.acls_loss` as a module."""

    function = staticmethod(acls_loss)
    alpha: float = 0.1
    pos_lambda: float = 1.0
    neg_lambda: float = 0.1
    margin: float = 10.0
    reference: Reference = "code"


@dataclass(eq=False, repr=False, kw_only=True)
class FocalLoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.focal_loss` as a module."""

    function = staticmethod(focal_loss)
    gamma: float = 3.0


@dataclass(eq=False, repr=False, kw_only=True)
class FLSDLoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.flsd_loss` as a module."""

    function = staticmethod(flsd_loss)
    gamma: float = 3.0


@dataclass(eq=False, repr=False, kw_only=True)
class DualFocalLoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.dual_focal_loss` as a module."""

    function = staticmethod(dual_focal_loss)
    gamma: float = 5.0


@dataclass(eq=False, repr=False, kw_only=True)
class BrierLoss(_TaskLoss):
    """:func:`~lightning_clamp.losses.brier_loss` as a module."""

    function = staticmethod(brier_loss)


@dataclass(eq=False, repr=False, kw_only=True)
class MDCALoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.mdca_loss` as a module."""

    function = staticmethod(mdca_loss)
    beta: float = 1.0


@dataclass(eq=False, repr=False, kw_only=True)
class DCALoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.dca_loss` as a module."""

    function = staticmethod(dca_loss)
    beta: float = 10.0


@dataclass(eq=False, repr=False, kw_only=True)
class MMCELoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.mmce_loss` as a module."""

    function = staticmethod(mmce_loss)
    lambda_: float = 1.0


@dataclass(eq=False, repr=False, kw_only=True)
class CPCLoss(_WeightedLoss):
    """:func:`~lightning_clamp.losses.cpc_loss` as a module."""

    function = staticmethod(cpc_loss)
    lambda_bdc: float = 0.1
    lambda_bec: float = 1.0


@dataclass(eq=False, repr=False, kw_only=True)
class SCBCELoss(_Loss):
    """:func:`~lightning_clamp.losses.sc_bce_loss` as a module; draws come from torch's own generator."""

    function = staticmethod(sc_bce_loss)
    alpha: float = 0.1
    kind: Kind = "HI"
    beta: float | None = None

    def no_samples(self) -> tuple[Any, ...]:
        """A batch of none, of one logit."""
        logits, target = super().no_samples()
        return logits[:, 0], target


@dataclass(eq=False, repr=False, kw_only=True)
class MarginAwareLoss(_TaskLoss):
    """:func:`~lightning_clamp.losses.margin_aware_loss` as a module, ``criterion(network, inputs, target)``."""

    function = staticmethod(margin_aware_loss)
    lambda_r: float = 0.5
    lambda_s: float = 0.01
    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 3
    norm: Norm = "linf"
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    clip: tuple[float, float] | None = (0.0, 1.0)
    attack_mode: Mode = "eval"

    def no_samples(self) -> tuple[Any, ...]:
        """A network of nothing, and a batch of none with the channels that the normalisation has."""
        logits, target = super().no_samples()
        channels = max(1 if isinstance(value, int | float) else len(value) for value in (self.mean, self.std))
        binary = logits.ndim == 1

        def network(x: Tensor) -> Tensor:
            return x.sum(1) if binary else x.sum(1, keepdim=True).expand(-1, 2)

        return network, torch.zeros(0, channels, device="cpu"), target

    def forward(self, network: Callable[[Tensor], Tensor], inputs: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """The loss of a batch of inputs."""
        loss: Tensor = margin_aware_loss(network, inputs, target, **self.options())
        return loss
