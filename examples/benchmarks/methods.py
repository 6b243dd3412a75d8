"""What can be done to a trained network with a calibration set: this package's ways, the published one, and peers'."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import peers
import torch
from cases import Problem
from torch import Tensor, nn
from torchvision.transforms import v2

from lightning_clamp import CalibrationModule, CalibrationResult, fit_clamp
from lightning_clamp._rows import Rows, as_rows
from lightning_clamp.clamping.map_loss import MapLoss, map_derivatives
from lightning_clamp.clamping.moments import logit_moments
from lightning_clamp.clamping.output_map import map_space
from lightning_clamp.clamping.paths import WholePath
from lightning_clamp.clamping.ranks import ALONE
from lightning_clamp.clamping.shrinkage import MapFit, fit_output_map
from lightning_clamp.clamping.temperature import fit_temperature

# As little as makes a minimum exist where a class has no sample, or is separated.
UNSHRUNK = 1e-3
# Changes of the NLL below this are those of a method's tolerance.
NOTHING = 1e-5


class Cell(NamedTuple):
    """One calibration set, and the data it is judged by.

    Attributes:
        case: Name of the network and data.
        size: Samples to calibrate with.
        direction: Which half is calibrated on, 1 or 2.
        calibration: The calibration set.
        held: The other half.
        outputs: The network's logits of the calibration set,
        held_outputs: and of the other half.
    """

    case: str
    size: int
    direction: int
    calibration: Problem
    held: Problem
    outputs: Tensor
    held_outputs: Tensor


class Outcome(NamedTuple):
    """What a method made of a cell: calibrated logits of the held-out half, and how it got there."""

    logits: Tensor
    seconds: float = 0.0
    result: CalibrationResult | None = None


Method = Callable[[Cell], Outcome | None]


def uncalibrated(cell: Cell) -> Outcome:
    """The network as it is."""
    return Outcome(cell.held_outputs)


def clamped(cell: Cell, *, outputs_only: bool = False, **options: Any) -> Outcome:
    """A clamp of this package, fitted through the network or on its outputs alone."""
    outputs_only = outputs_only or not cell.calibration.perturbable
    network: nn.Module = nn.Identity() if outputs_only else cell.calibration.network
    inputs = cell.outputs if outputs_only else cell.calibration.inputs
    started = time.perf_counter()
    result = fit_clamp(
        network, cell.calibration._replace(inputs=inputs).batches(), task=cell.calibration.task, **options
    )
    seconds = time.perf_counter() - started
    if result.clamp.perturbation is None and not result.spec.views:
        return Outcome(result.clamp.cpu().scale(cell.held_outputs), seconds, result)
    module = CalibrationModule.from_result(network, result)
    return Outcome(forward(cell.held._replace(network=module)), seconds, result)


def published(cell: Cell, *, augmented: bool = False) -> Outcome | None:
    """Neural Clamping with the official demo's settings: 100 epochs of five steps each."""
    if not cell.calibration.perturbable or cell.calibration.task == "binary":
        return None
    cell = cell._replace(calibration=cell.calibration._replace(batch_size=-(-cell.size // 5)))
    return clamped(cell, method="published", augmentation=_augmented if augmented else None)


def _augmented(images: Tensor) -> Tensor:
    """The official loader's augmentation of the calibration images: shifts, flips, and a hole of 4×4 pixels."""
    side = images.shape[-1]
    hole = (4 / side) ** 2
    steps = v2.Compose(
        [
            v2.RandomCrop(side, padding=4),
            v2.RandomHorizontalFlip(),
            v2.RandomErasing(p=1.0, scale=(hole, hole), ratio=(1.0, 1.0)),
        ]
    )
    return torch.stack([steps(image) for image in images])


class OneBatch(list[Rows]):
    """Rows of this process alone, as the methods take them."""

    ranks = ALONE


def unshrunk_vector(logits: Tensor, target: Tensor) -> MapFit | None:
    """Scale and bias per class, not shrunk (Guo et al., 2017); nothing where its best temperature is not positive."""
    rows, classes = OneBatch([as_rows(logits.double(), target)]), logits.shape[1]
    temperature = math.exp(fit_temperature(rows).log_temperature)
    space = map_space("vector", logit_moments(rows, classes))
    start = space.temperature_only(temperature)
    path = WholePath(map_derivatives(rows, space, start, dense=False), space.weight)
    return fit_output_map(MapLoss(rows, space), path, UNSHRUNK, start, len(target))


def vector_scaling(cell: Cell) -> Outcome | None:
    """Vector scaling, not shrunk; nothing where it has no positive temperature."""
    if cell.calibration.task == "binary":
        return None
    started = time.perf_counter()
    fit = unshrunk_vector(cell.outputs, cell.calibration.target)
    if fit is None:
        return None
    seconds = time.perf_counter() - started
    return Outcome(fit.space.apply(cell.held_outputs.double(), fit.free), seconds)


def peer(cell: Cell, *, fit: peers.Fit) -> Outcome | None:
    """Another library's calibrator of the logits."""
    if cell.calibration.task == "binary":
        return None
    started = time.perf_counter()
    scaled = fit(cell.outputs.float(), cell.calibration.target)
    return Outcome(scaled(cell.held_outputs.float()), time.perf_counter() - started)


def paired(losses: Tensor, reference: Tensor) -> tuple[float, float]:
    """Mean difference of the losses of the same samples, and its standard error."""
    change = losses - reference
    return float(change.mean()), float(change.std()) / math.sqrt(len(change))


def forward(problem: Problem) -> Tensor:
    """Logits of all inputs, on the CPU."""
    with torch.no_grad():
        return torch.cat([problem.network(part) for part in problem.inputs.split(problem.batch_size)]).cpu()


# Cheap enough for every calibration size; the first two are what the others are compared with.
LIGHT: dict[str, Method] = {
    "temperature": partial(clamped, outputs_only=True, method="temperature"),
    "vector scaling": vector_scaling,
    "uncalibrated": uncalibrated,
    "default": clamped,
    "default, outputs only": partial(clamped, outputs_only=True, grids=()),
}
# Many passes over the images: for some of the cells.
PERTURBATION: dict[str, Method] = {"perturbation and T": partial(clamped, output_maps=("temperature",))}
# A forward more for every image.
MIRROR: dict[str, Method] = {
    "temperature, with mirror images": partial(clamped, method="temperature", views=("hflip",)),
    "default, with mirror images": partial(clamped, views=("hflip",)),
    "perturbation and T, with mirror images": partial(clamped, output_maps=("temperature",), views=("hflip",)),
}
PUBLISHED: dict[str, Method] = {"published": published}
AUGMENTED: dict[str, Method] = {"published, augmented": partial(published, augmented=True)}


def of_peers() -> dict[str, Method]:
    """The calibrators of other libraries that are installed here."""
    return {name: partial(peer, fit=fit) for name, fit in peers.installed().items()}
