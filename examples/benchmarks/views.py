"""What averaging over mirror images brings held out, with the temperature and with the default."""

from collections.abc import Iterator
from pathlib import Path

import torch
from cases import load
from methods import LIGHT, MIRROR, PERTURBATION, Cell, Outcome, forward, paired
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp import metrics

SIZES = (250, 1000)
SMALL = ("cifar10-resnet20", "cifar10-resnet20 jpeg 40")
# Where a perturbation is worth its cost.
PERTURBED = "cifar10-resnet20 contrast 0.5"
FULL = (*SMALL, PERTURBED, "cifar100-resnet32", "cifar100-resnet32 jpeg 40")
WITHOUT = {name: LIGHT[name] for name in ("temperature", "default")}


def report(folder: Path, full: bool) -> Iterator[str]:
    """The tables, in Markdown."""
    yield """## Views

Held-out NLL, its change against the temperature and what mirror images change for the same method, in units of .001
with paired standard errors; ECE and accuracy.
"""
    yield "| network and data | samples | method | NLL | against the temperature | by mirror images | ECE | accuracy |"
    yield "|" + "---|" * 8
    for case in FULL if full else SMALL:
        for cell in _cells(case, folder):
            yield from _lines(cell)


def _cells(case: str, folder: Path) -> Iterator[Cell]:
    """One half of the data is calibrated on, the other judges."""
    problem = load(case, folder)
    outputs = forward(problem)
    pool, held = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(0)).chunk(2)
    for size in SIZES:
        part = pool[:size]
        yield Cell(case, size, 1, problem.part(part), problem.part(held), outputs[part], outputs[held])


def _lines(cell: Cell) -> Iterator[str]:
    losses: dict[str, Tensor] = {}
    without = WITHOUT | (PERTURBATION if cell.case == PERTURBED else {})
    methods = without | {name: fit for name, fit in MIRROR.items() if name.partition(",")[0] in without}
    for name, fit in methods.items():
        outcome = fit(cell)
        assert outcome is not None
        loss = losses[name] = F.cross_entropy(outcome.logits.double(), cell.held.target, reduction="none")
        cells = [cell.case, f"{cell.size:,}", _named(name, outcome), f"{float(loss.mean()):.4f}"]
        cells += [
            "" if loss is other else "{:+.1f} ± {:.1f}".format(*(1000 * number for number in paired(loss, other)))
            for other in (losses["temperature"], losses[name.partition(",")[0]])
        ]
        for metric in (metrics.expected_calibration_error, metrics.accuracy):
            cells.append(f"{float(metric(outcome.logits, cell.held.target)):.2%}")
        yield f"| {' | '.join(cells)} |"


def _named(name: str, outcome: Outcome) -> str:
    chosen = None if outcome.result is None else outcome.result.chosen
    return name if chosen is None else f"{name} ({chosen.name})"
