"""What the speed tables share: clocks, counted passes, Markdown."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_clamp import CalibrationResult, fit_clamp

Result = TypeVar("Result")

# The kinds of pass that a fit is made of, as the tables call them.
FORWARD, GRADIENT = "forward", "with backward"


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the cells of the head are parted by bars."""
    columns = [cell.strip() for cell in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def clocked(run: Callable[[], Result]) -> tuple[Result, float]:
    """What it returns, and its seconds; those of a GPU's queue too."""
    started = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def fitted(
    network: Callable[[Tensor], Tensor], batches: Iterable[Sequence[Tensor]], **options: Any
) -> tuple[CalibrationResult, float]:
    """A fit and its seconds, the whole call's; without a word on networks that it leaves as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return clocked(lambda: fit_clamp(network, batches, **options))


class Counted(nn.Module):
    """A network that counts the images it is given, by whether their logits carry a gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # Not a dict: a fit puts a network's dicts back as they were.
        self.images: Counter[str] = Counter()

    def forward(self, images: Tensor) -> Tensor:
        """The network's logits."""
        logits = self.network(images)
        self.images[GRADIENT if logits.requires_grad else FORWARD] += len(images)
        return logits

    def passes(self, n: int) -> dict[str, float]:
        """Passes over n images."""
        return {kind: self.images[kind] / n for kind in (FORWARD, GRADIENT)}


def forward_pass(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Without gradients."""
    with torch.no_grad():
        for images, _ in batches:
            network(images)


def gradient_pass(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Forward, and backward to the input alone; the network is frozen."""
    for images, target in batches:
        point = images.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(network(point), target, reduction="sum"), point)


def summed(passes: dict[str, float]) -> str:
    """Passes by their kinds, as the tables have them."""
    return " + ".join(f"{number:.4g}" for number in passes.values())


def chosen(result: CalibrationResult) -> str:
    """The chosen candidate's name."""
    return "nothing" if result.chosen is None else result.chosen.name
