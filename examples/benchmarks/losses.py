"""How long each loss takes, forward and backward, in units of torch's cross-entropy.

    python examples/benchmarks/losses.py
    python examples/benchmarks/losses.py --compile --device cuda

Class outputs (128, 1000) and a dense batch (4, 21, 256, 256), float32. Every loss takes turns with the cross-entropy;
the cell is the median of the ratios of neighbours, so that a busy machine slows both. With ``--compile`` both sides
go through torch.compile.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp import losses

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
SHAPES = ((128, 1000), (4, 21, 256, 256))
# The options under which every term is at work on the logits drawn below.
LOSSES: dict[str, Loss] = {
    "ACLS": lambda z, y: losses.acls_loss(z, y, margin=6.0),
    "ACLS, paper": lambda z, y: losses.acls_loss(z, y, margin=6.0, reference="paper"),
    "MbLS": lambda z, y: losses.mbls_loss(z, y, margin=6.0),
    "focal": losses.focal_loss,
    "MDCA": losses.mdca_loss,
    "FLSD": losses.flsd_loss,
    "dual focal": losses.dual_focal_loss,
    "label smoothing": losses.label_smoothing_loss,
    "entropy penalty": losses.entropy_penalty_loss,
    "Brier": losses.brier_loss,
    "DCA": losses.dca_loss,
    "MMCE": losses.mmce_loss,
}


def seconds(loss: Loss, logits: Tensor, target: Tensor) -> float:
    """Time of one forward and backward pass."""
    logits.grad = None
    start = time.perf_counter()
    loss(logits, target).backward()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(loss: Loss, baseline: Loss, batch: tuple[Tensor, Tensor], budget: float) -> float:
    """Median of the ratios of neighbouring runs."""
    for _ in range(3):
        once = seconds(loss, *batch) + seconds(baseline, *batch)
    runs = max(15, min(2000, int(budget / once)))
    return median(seconds(loss, *batch) / seconds(baseline, *batch) for _ in range(runs))


def drawn(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits, as large as those of trained networks, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(shape, generator=generator)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    return logits.to(device).requires_grad_(), target.to(device)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="through torch.compile, both sides")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on each cell")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    how = "compiled" if arguments.compile else "eager"
    print(f"torch {torch.__version__}, {name}, {how}, ratio to cross-entropy\n")
    batches = [drawn(shape, device) for shape in SHAPES]
    print("| loss | " + " | ".join(map(str, SHAPES)) + " |\n|---|" + "---|" * len(SHAPES))
    for label, loss in LOSSES.items():
        cells = []
        for batch in batches:
            # Compiled code of other shapes would be made again for shapes that vary.
            torch.compiler.reset()
            sides = [torch.compile(side) if arguments.compile else side for side in (loss, F.cross_entropy)]
            cells.append(f"{ratio(*sides, batch, arguments.seconds):.2f}")
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
