"""How long each loss takes, forward and backward, in units of torch's cross-entropy.

    python examples/benchmarks/losses.py
    python examples/benchmarks/losses.py --compile --device cuda

Class outputs of two sizes and a dense batch, float32. Every loss takes turns with the cross-entropy; the cell is the
median of the ratios of neighbours, so that a busy machine slows both. With ``--compile`` there is a second table, for
which both sides go through torch.compile.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp import losses

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Batch: TypeAlias = tuple[Tensor, Tensor]
SHAPES = ((128, 1000), (1024, 1000), (8, 21, 256, 256))
# The options under which every term is at work on the logits drawn below.
LOSSES: dict[str, Loss] = {
    "ACLS": losses.ACLSLoss(margin=6.0),
    "ACLS, paper": losses.ACLSLoss(margin=6.0, reference="paper"),
    "MbLS": losses.MbLSLoss(margin=6.0),
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
        torch.cuda.synchronize(logits.device)
    return time.perf_counter() - start


def ratio(loss: Loss, baseline: Loss, batch: Batch, budget: float) -> float:
    """Median of the ratios of neighbouring runs."""
    for _ in range(3):
        once = seconds(loss, *batch) + seconds(baseline, *batch)
    runs = max(15, min(2000, int(budget / once)))
    return median(seconds(loss, *batch) / seconds(baseline, *batch) for _ in range(runs))


def milliseconds(loss: Loss, batch: Batch, budget: float) -> float:
    """Median time of one run."""
    for _ in range(3):
        once = seconds(loss, *batch)
    return 1e3 * median(seconds(loss, *batch) for _ in range(max(15, min(2000, int(budget / once)))))


def drawn(shape: tuple[int, ...], device: torch.device) -> Batch:
    """Logits, as large as those of trained networks, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(shape, generator=generator)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    return logits.to(device).requires_grad_(), target.to(device)


def device_report(
    device: torch.device,
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    eager: Sequence[str] = tuple(LOSSES),
    compiled: Sequence[str] = ("ACLS", "MbLS", "focal", "MDCA"),
    budget: float = 0.5,
) -> Iterator[str]:
    """Tables in Markdown, line by line: milliseconds of the cross-entropy, and ratios to it.

    Args:
        device: To measure on.
        shapes: Of the logits.
        eager: Names of ``LOSSES`` to measure as they are written.
        compiled: Those to measure through torch.compile, which takes some seconds for each cell.
        budget: Seconds to spend on each cell.
    """
    batches = [drawn(shape, device) for shape in shapes]
    for head, names in (("eager", eager), ("compiled", compiled)):
        if not names:
            continue
        # Code for each shape: it would be made again for shapes that vary.
        way: Callable[[Loss], Loss] = partial(torch.compile, dynamic=False) if head == "compiled" else lambda loss: loss
        baseline = way(F.cross_entropy)
        yield f"| {head} | " + " | ".join(map(str, shapes)) + " |"
        yield "|---|" + "---|" * len(shapes)
        times = [f"{milliseconds(baseline, batch, budget):.3f}" for batch in batches]
        yield "| cross-entropy, ms | " + " | ".join(times) + " |"
        for name in names:
            loss = way(LOSSES[name])
            ratios = [f"{ratio(loss, baseline, batch, budget):.2f}" for batch in batches]
            yield f"| {name} | " + " | ".join(ratios) + " |"
        yield ""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also through torch.compile, both sides")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="these alone")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on each cell")
    arguments = parser.parse_args()
    device, names = torch.device(arguments.device), arguments.losses
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, ratio to cross-entropy\n")
    compiled = names if arguments.compile else ()
    for line in device_report(device, eager=names, compiled=compiled, budget=arguments.seconds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
