"""What a network's precision changes in its clamp: CIFAR-10 re-encoded as JPEG, ResNet-20, the first 1,000 images.

python examples/benchmarks/precision.py --data DIR
"""

import argparse
import copy
from pathlib import Path

import torch
from cases import load
from torch import Tensor, nn

from lightning_clamp import fit_clamp

N, BATCH = 1000, 250


class InPrecision(nn.Module):
    """A network under autocast, or with its weights cast."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, *, mixed: bool) -> None:
        super().__init__()
        self.network, self.dtype, self.mixed = network if mixed else network.to(dtype), dtype, mixed

    def forward(self, x: Tensor) -> Tensor:
        """Logits in that precision."""
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.mixed):
            return self.network(x)


KINDS = {
    "32": (torch.float32, False),
    "bf16-mixed": (torch.bfloat16, True),
    "16-mixed": (torch.float16, True),
    "bf16-true": (torch.bfloat16, False),
    "16-true": (torch.float16, False),
}


def main() -> None:
    """Fit in every precision and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with load.py and weights/")
    parser.add_argument("--jpeg", type=int, default=40, help="JPEG quality of the shifted copy (default 40)")
    options = parser.parse_args()
    problem = load(f"cifar10-resnet20 jpeg {options.jpeg}", options.data)
    print(f"torch {torch.__version__}, CPU")
    print("| precision | T | NLL before → after | ECE after | score test of the 1×1 grid |")
    print("|---|---|---|---|---|")
    for name, (dtype, mixed) in KINDS.items():
        network = InPrecision(copy.deepcopy(problem.network), dtype, mixed=mixed)
        # A Trainer in true half precision casts the batches too, before anything is added to them.
        images = (problem.inputs if mixed else problem.inputs.to(dtype))[:N]
        batches = list(zip(images.split(BATCH), problem.target[:N].split(BATCH), strict=True))
        result = fit_clamp(network, batches, grids=(1, 2), output_maps=("temperature",), max_passes=4)
        statistic = next(c.lm_statistic for c in result.candidates if c.grid == 1)
        nll = f"{result.before['nll']:.4f} → {result.after['nll']:.4f}"
        print(
            f"| {name} | {float(result.clamp.temperature):.3f} | {nll} | {result.after['ece']:.1%} | {statistic:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
