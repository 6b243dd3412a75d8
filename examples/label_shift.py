"""Class frequencies change after calibration: what a clamp for the new ones gains, and what it costs without a shift.

A small convnet is trained on 100 handwritten digits and calibrated on 700. Then the test set is drawn again and again
with other class frequencies. One half of each draw, without its labels, gives the frequencies; the other half judges.
"""

import argparse
import logging
from statistics import mean, stdev
from typing import NamedTuple

import torch
from digits import DigitsClassifier, DigitsData
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_clamp import CalibrationModule, NeuralClamping, shifted_priors

# How evenly the classes are thinned out: the shape of a gamma distribution of what is kept; None for no shift.
SHIFTS = {"none": None, "mild": 5.0, "strong": 1.0, "extreme": 0.3}


class Draw(NamedTuple):
    """NLL on the half that judges, and what was estimated from the other."""

    before: float
    after: float
    if_sure: float
    error: float


def calibrated(seed: int, epochs: int) -> tuple[CalibrationModule, DigitsData]:
    """A digits classifier with its clamp, and its data."""
    seed_everything(seed, verbose=False)
    model, data, clamping = DigitsClassifier(width=16), DigitsData(n_val=100, n_calibration=700), NeuralClamping()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, callbacks=[clamping], enable_checkpointing=False, accelerator="cpu", **quiet)
    trainer.fit(model, datamodule=data)
    return clamping.calibrated_module(), data


def drawn(target: Tensor, concentration: float | None, generator: torch.Generator) -> Tensor:
    """Indices of a test set in which classes are thinned out at random."""
    kept = torch.ones(10)
    if concentration is not None:
        gamma = torch.distributions.Gamma(concentration, 1.0)
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        weights = gamma.sample((10,))
        kept = weights / weights.max()
    chosen = (torch.rand(len(target), generator=generator) < kept[target]).nonzero()[:, 0]
    return chosen[torch.randperm(len(chosen), generator=generator)]


def one_draw(module: CalibrationModule, priors: Tensor, images: Tensor, target: Tensor) -> Draw:
    """Estimate on one half and judge on the other."""
    half = len(target) // 2
    unlabelled = DataLoader(TensorDataset(images[:half], target[:half]), batch_size=500)
    found = shifted_priors(module, unlabelled, priors=priors)
    with torch.no_grad():
        before, after = (float(F.cross_entropy(one(images[half:]), target[half:])) for one in (module, found.module))
    truth = torch.bincount(target, minlength=10).double() / len(target)
    error = float((found.after.values - truth).abs().sum() / 2)
    return Draw(before, after, after if float(found.after.p_no_shift) < 0.01 else before, error)


def main() -> None:
    """Train, calibrate, shift, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="networks (default: 3)")
    parser.add_argument("--draws", type=int, default=10, help="test sets of each network and shift (default: 10)")
    parser.add_argument("--epochs", type=int, default=40, help="of training (default: 40)")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows: dict[str, list[list[Draw]]] = {name: [] for name in SHIFTS}
    for seed in range(options.seeds):
        module, data = calibrated(seed, options.epochs)
        labels = torch.stack([label for _, label in data.calibration])
        priors = torch.bincount(labels, minlength=10).double() / len(labels)
        images, target = (torch.stack(list(part)) for part in zip(*data.test, strict=True))
        generator = torch.Generator().manual_seed(seed)
        for name, concentration in SHIFTS.items():
            indices = [drawn(target, concentration, generator) for _ in range(options.draws)]
            rows[name].append([one_draw(module, priors, images[chosen], target[chosen]) for chosen in indices])
    print("| shift | NLL before | change | change, only where p < 0.01 | error of the frequencies |")
    print("|---|---|---|---|---|")
    for name, networks in rows.items():
        print(f"| {name} | {_line(networks)} |")


def _line(networks: list[list[Draw]]) -> str:
    """Means over the networks, of which each is one observation, with their standard errors."""
    before = mean(mean(draw.before for draw in draws) for draws in networks)
    changes = [[mean(draw.after - draw.before for draw in draws) for draws in networks]]
    changes.append([mean(draw.if_sure - draw.before for draw in draws) for draws in networks])
    error = mean(mean(draw.error for draw in draws) for draws in networks)
    cells = [f"{mean(one):+.4f} ± {stdev(one) / len(one) ** 0.5 if len(one) > 1 else 0:.4f}" for one in changes]
    return f"{before:.4f} | {' | '.join(cells)} | {error:.1%}"


if __name__ == "__main__":
    main()
