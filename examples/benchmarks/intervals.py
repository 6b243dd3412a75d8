"""How often the bootstrap intervals of a change hold the true change, on data whose truth is known.

    python examples/benchmarks/intervals.py

Labels are drawn from the softmax of random logits over 10 classes. Before calibration the logits are twice as large;
after it they are the true ones times a factor: 1 (calibrated), 1.1 (slightly over-confident) or 0.8 (under-confident).
The truth is taken from 400,000 samples. Beside the intervals of `paired_bootstrap` (basic) stands what the quantiles of
the resamples themselves (percentile) would give.
"""

import argparse

import torch
from torch import Tensor

from lightning_clamp.metrics import BlockSums, BootstrapSums, paired_bootstrap


def drawn(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits of a calibrated network and labels drawn from them."""
    logits = 3 * torch.randn(n, 10, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def sums_of(logits: Tensor, target: Tensor) -> BlockSums:
    """The sums of a sample, ready to be resampled."""
    metric = BootstrapSums()
    metric.update(logits, target)
    return metric.compute()


def main() -> None:
    """Print the coverage of both intervals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=300, help="samples drawn per line (default 300)")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    population = drawn(400_000, generator)
    print("| after | samples | change of | true change | basic covers | percentile covers | mean width |")
    print("|---|---|---|---|---|---|---|")
    for factor in (1.0, 1.1, 0.8):
        truth = paired_bootstrap(*(sums_of(f * population[0], population[1]) for f in (2, factor)), resamples=2)
        for n in (500, 2000, 5000):
            basic, percentile, width = ({"nll": 0.0, "ece": 0.0} for _ in range(3))
            for seed in range(options.draws):
                logits, target = drawn(n, generator)
                change = paired_bootstrap(*(sums_of(f * logits, target) for f in (2, factor)), resamples=400, seed=seed)
                for name in basic:
                    value, low, high = change[name]
                    true = truth[name].value
                    basic[name] += (low <= true <= high) / options.draws
                    percentile[name] += (2 * value - high <= true <= 2 * value - low) / options.draws
                    width[name] += (high - low) / options.draws
            for name in basic:
                cells = f"{truth[name].value:+.4f} | {basic[name]:.0%} | {percentile[name]:.0%} | {width[name]:.4f}"
                print(f"| {factor} x true logits | {n} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
