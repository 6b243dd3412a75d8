"""The methods, and the options of each: one dataclass that checks itself."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor
from typing_extensions import NotRequired

from lightning_clamp._checks import check_choice, check_number, check_whole
from lightning_clamp.clamping.output_map import OUTPUT_MAPS, OutputMap
from lightning_clamp.spec import Spec, SpecKeywords

Method: TypeAlias = Literal["clamp", "published", "temperature"]


@dataclass(frozen=True)
class ClampOptions:
    """Options of ``method="clamp"``.

    Attributes:
        grids: Perturbations to consider, as sides r of an r×r grid of coefficients per channel; ``()`` leaves the input
            alone.
        output_maps: Output maps to consider: ``"bias"``, ``"vector"`` (a scale and a bias for each class), ``"beta"``
            (two classes: their evidence has a slope each) and ``"matrix"`` (each class's logit also counts for the
            others; up to 300 classes, of outputs per pixel up to 30). The temperature always takes part. With two
            classes a matrix is a vector and a beta map, with several labels it is a vector; with one logit a vector
            is ``"bias"``.
        uniform_share: Whether the probabilities may be mixed with a share of the uniform distribution, which takes on
            rows with a wrong label that the network is sure of; not of several labels. Without it,
            ``output_maps=("temperature",)`` is plain Neural Clamping.
        max_passes: Most passes spent on one grid, at least 1.
    """

    grids: Sequence[int] = (1, 2, 4, 8)
    output_maps: Sequence[OutputMap] = ("temperature", "vector", "matrix")
    uniform_share: bool = True
    max_passes: int = 6

    def __post_init__(self) -> None:
        if not _is_sequence(self.grids, lambda size: isinstance(size, int) and size >= 1):
            raise ValueError(f"`grids` must be a sequence of whole numbers of at least 1, got {self.grids!r}.")
        if not _is_sequence(self.output_maps, lambda name: name in OUTPUT_MAPS):
            raise ValueError(
                f"`output_maps` must be a sequence of names among {OUTPUT_MAPS}, got {self.output_maps!r}."
            )
        check_choice("uniform_share", self.uniform_share, (False, True))
        check_whole("max_passes", self.max_passes, least=1)

    @property
    def reads_again(self) -> bool:
        """Whether later passes are to see the batches of the first."""
        return bool(self.grids)


@dataclass(frozen=True)
class PublishedOptions:
    """Options of ``method="published"``; the defaults are those of the official demo (ResNet-110 on CIFAR-100).

    Attributes:
        epochs: Passes over the calibration set.
        lr: Learning rate, above 0.
        momentum: Momentum of SGD, in [0, 1); unused by AdamW.
        nesterov: Nesterov momentum for SGD, which then must be above 0.
        optimizer: ``"sgd"`` or ``"adamw"`` (weight decay 0.01 on both parameters, torch's default).
        gamma: Focal exponent, at least 0; None for the cross-entropy.
        loss_weight: λ₀, at least 0.
        norm_weight: λ₁, at least 0.
        dropout: Probability of dropping an entry of δ in a training step, in [0, 1).
        initial: ``"random"``, normal times ``initial_scale``; ``"data-driven"``, see
            :func:`~.published.data_driven_perturbation`; or a tensor of the shape of one input.
        initial_scale: Standard deviation of the random start, at least 0.
        initial_temperature: T to start from, above 0.
        augmentation: Applied to every batch of inputs (a dict of tensors where they are named) before the perturbation.
        seed: Of the initial perturbation, dropout, and any randomness of the loader and the augmentation.
    """

    epochs: int = 100
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    optimizer: Literal["sgd", "adamw"] = "sgd"
    gamma: float | None = 1.0
    loss_weight: float = 1.0
    norm_weight: float = 0.01
    dropout: float = 0.0
    initial: Any = "random"
    initial_scale: float = 0.001
    initial_temperature: float = 1.0
    augmentation: Callable[..., Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, least=1)
        check_whole("seed", self.seed, least=0)
        for name in ("lr", "initial_temperature"):
            check_number(name, getattr(self, name), above=0)
        for name in ("loss_weight", "norm_weight", "initial_scale"):
            check_number(name, getattr(self, name), least=0)
        for name in ("momentum", "dropout"):
            check_number(name, getattr(self, name), least=0, below=1)
        if self.gamma is not None:
            check_number("gamma", self.gamma, least=0)
        check_choice("nesterov", self.nesterov, (False, True))
        if self.nesterov and self.momentum == 0:
            raise ValueError("`nesterov` needs a `momentum` above 0, got 0.")
        check_choice("optimizer", self.optimizer, ("sgd", "adamw"))
        if not isinstance(self.initial, Tensor) and self.initial not in ("random", "data-driven"):
            raise ValueError(f"`initial` must be 'random', 'data-driven' or a tensor, got {self.initial!r}.")
        if self.augmentation is not None and not callable(self.augmentation):
            raise ValueError(f"`augmentation` must be callable, or None, got {self.augmentation!r}.")

    @property
    def reads_again(self) -> bool:
        """No: an epoch has batches of its own, in another order where the loader shuffles."""
        return False


@dataclass(frozen=True)
class TemperatureOptions:
    """``method="temperature"`` has none."""

    @property
    def reads_again(self) -> bool:
        """No: one pass gives the logits."""
        return False


MethodOptions: TypeAlias = ClampOptions | PublishedOptions | TemperatureOptions
_OPTIONS: dict[Method, type[MethodOptions]] = {
    "clamp": ClampOptions,
    "published": PublishedOptions,
    "temperature": TemperatureOptions,
}


# The fields of the dataclasses once more, as keywords, for type checkers, editors and command lines; the tests hold it
# against them. Every key says NotRequired: see SpecKeywords.
class ClampKeywords(SpecKeywords):
    """Settings, and options of the methods: a call takes those of its own.

    Attributes:
        grids: Of "clamp": perturbations to consider, as sides of a grid of coefficients; an empty list for none.
        output_maps: Of "clamp": output maps to consider; the temperature always takes part.
        uniform_share: Of "clamp": whether the probabilities may be mixed with a share of the uniform distribution.
        max_passes: Of "clamp": most passes spent on one grid.
        epochs: Of "published": passes over the calibration set.
        lr: Of "published": learning rate.
        momentum: Of "published": momentum; unused by AdamW.
        nesterov: Of "published": whether the momentum is Nesterov's.
        optimizer: Of "published": which optimizer.
        gamma: Of "published": focal exponent; None for the cross-entropy.
        loss_weight: Of "published": weight of the focal loss.
        norm_weight: Of "published": weight of the perturbation's norm.
        dropout: Of "published": probability of dropping an entry of the perturbation in a training step.
        initial: Of "published": where the perturbation starts, "random", "data-driven" or a tensor.
        initial_scale: Of "published": standard deviation of the random start.
        initial_temperature: Of "published": temperature to start from.
        augmentation: Of "published": applied to every batch of inputs before the perturbation.
        seed: Of "published": seed of all that is random.
    """

    grids: NotRequired[Sequence[int]]
    output_maps: NotRequired[Sequence[OutputMap]]
    uniform_share: NotRequired[bool]
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


class Plan(NamedTuple):
    """What is to be done: by which method, with what options, and how batches and outputs are read."""

    method: Method
    options: MethodOptions
    spec: Spec

    def check_ranks(self, n_ranks: int) -> None:
        """Refuse the published method where several ranks share the set."""
        if self.method == "published" and n_ranks > 1:
            raise ValueError(
                f'method="published" takes a step after every batch, so {n_ranks} ranks with a part of the set each '
                "would not do what the published method does: run it on one device."
            )


def make_plan(method: Method, keywords: Mapping[str, Any], caller: Callable[..., Any]) -> Plan:
    """Sort flat keywords into settings and options, which check themselves.

    Args:
        method: Which method.
        keywords: What ``caller`` got beside its own parameters.
        caller: The function or class that users call, for the names it takes.

    Raises:
        TypeError: If a keyword is unknown, or an option of another method; the nearest known one is named.
        ValueError: If a value cannot be.
    """
    check_choice("method", method, tuple(_OPTIONS))
    settings, options = names_of(Spec), names_of(_OPTIONS[method])
    for name in keywords:
        if name not in {*settings, *options}:
            raise TypeError(_unknown(name, method, caller))
    return Plan(
        method,
        _OPTIONS[method](**{name: value for name, value in keywords.items() if name in options}),
        Spec(**{name: value for name, value in keywords.items() if name in settings}),
    )


def names_of(dataclass_type: Any) -> list[str]:
    """Names of the fields of a dataclass."""
    return [field.name for field in fields(dataclass_type)]


def unknown_keyword(name: str, known: Sequence[str], caller: Callable[..., Any]) -> str:
    """What refuses a keyword: the nearest one that ``caller`` takes, and all of them, for it may be far off."""
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f": did you mean `{nearest[0]}`?" if nearest else "."
    return f"{caller.__name__} has no argument `{name}`{hint} It takes {', '.join(known)}."


def _unknown(name: str, method: Method, caller: Callable[..., Any]) -> str:
    owners = [f'method="{other}"' for other, options in _OPTIONS.items() if name in names_of(options)]
    if owners:
        return f'`{name}` is an option of {" and ".join(owners)}, and the method is "{method}".'
    own = [
        parameter.name
        for parameter in inspect.signature(caller).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    return unknown_keyword(name, [*own, *names_of(Spec), *names_of(_OPTIONS[method])], caller)


def _is_sequence(value: Any, right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(right(item) for item in value)
