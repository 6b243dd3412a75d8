"""Several labels per image: train a small network until it is over-confident, and each label comes out calibrated.

    python examples/multilabel.py

The data are scikit-learn's handwritten digits, 1,797 images that come with the package. The labels are made from the
digits: of a three it is true that it is prime, and not that it is even or has a loop. A part of them is not known (-1),
and the loss weighs positives, as is often done where they are rare. The picture is written to ``multilabel/``.
"""

import argparse
import logging
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_clamp import CalibrationModule, NeuralClamping, fit_clamp
from lightning_clamp.metrics import expected_calibration_error, negative_log_likelihood

# Of which digits each label is true, as they are usually written.
TRUE_OF = {
    "even": (0, 2, 4, 6, 8), "five or more": (5, 6, 7, 8, 9), "prime": (2, 3, 5, 7), "has a loop": (0, 6, 8, 9),
    "two loops": (8,), "square number": (0, 1, 4, 9), "straight lines only": (1, 4, 7), "above six": (7, 8, 9),
}  # fmt: skip
UNKNOWN = -1
LABELS = {"task": "multilabel", "ignore_index": UNKNOWN}


class LitAttributes(LightningModule):
    """A network with one logit per label; nothing in it knows of calibration."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(TRUE_OF)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, one per label."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Binary cross-entropy of the labels that are known, with positives weighted three times."""
        x, target = batch
        losses = F.binary_cross_entropy_with_logits(
            self(x), target.clamp(min=0), reduction="none", pos_weight=torch.tensor(3.0)
        )
        return losses[target != UNKNOWN].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def attributes() -> tuple[Subset, Subset, Subset]:
    """Noisy images and what is true of them, to train, to calibrate and to test; a fifth of the labels is unknown."""
    data = load_digits()
    generator = torch.Generator().manual_seed(0)
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images += 0.5 * torch.randn(images.shape, generator=generator)
    digits = torch.tensor(data.target)
    target = torch.stack([torch.isin(digits, torch.tensor(those)) for those in TRUE_OF.values()], 1).float()
    target[torch.rand(target.shape, generator=generator) < 0.2] = UNKNOWN
    train, calibration, test = random_split(TensorDataset(images, target), [600, 500, 697], generator)
    return train, calibration, test


def main() -> None:
    """Train, calibrate, and compare on held-out images: no clamp, a temperature alone, and the clamp."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("multilabel"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    arguments.out.mkdir(parents=True, exist_ok=True)

    seed_everything(0, verbose=False)
    train, calibration, test = attributes()
    calibration_loader = DataLoader(calibration, batch_size=250)
    clamping = NeuralClamping(calibration_loader, grids=(), **LABELS)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=arguments.epochs, accelerator="cpu", callbacks=[clamping], enable_checkpointing=False, **quiet
    )
    model = LitAttributes()
    trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True))
    print(f"calibration set\n{clamping.result}\n")

    temperature = fit_clamp(model, calibration_loader, method="temperature", **LABELS)
    modules = {
        "before": model.eval(),
        "temperature": CalibrationModule.from_result(model, temperature),
        "clamp": clamping.calibrated_module(),
    }
    images, target = next(iter(DataLoader(test, batch_size=len(test))))
    with torch.no_grad():
        logits = {name: module(images) for name, module in modules.items()}
    ece = compare(logits, target)
    draw(ece, arguments.out / "ece.png")
    print(f"written: {arguments.out / 'ece.png'}")


def compare(logits: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
    """Print NLL and ECE of each label and their means on images that served no fit; returns the ECEs."""
    of_each = {"average": "none", **LABELS}
    nll = {name: negative_log_likelihood(z, target, **of_each) for name, z in logits.items()}
    ece = {name: expected_calibration_error(z, target, **of_each) for name, z in logits.items()}
    print(f"{'held-out test':<22}{'NLL ' + ', '.join(logits):<34}{'ECE'}")
    for k, label in enumerate([*TRUE_OF, "mean"]):
        first, second = (
            [float(values.mean() if label == "mean" else values[k]) for values in numbers.values()]
            for numbers in (nll, ece)
        )
        print(f"{label:<22}{''.join(f'{x:<11.4f}' for x in first)} {''.join(f'{x:<9.2%}' for x in second)}".rstrip())
    return ece


def draw(ece: dict[str, Tensor], path: Path) -> None:
    """Draw the ECE of each label, the worst on top."""
    from matplotlib import pyplot as plt

    order = ece["before"].argsort().tolist()
    names = list(TRUE_OF)
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    low, high = ece["clamp"][order], ece["before"][order]
    axes.hlines(range(len(order)), low, high, color="0.8", linewidth=3, zorder=1)
    for (name, values), colour in zip(ece.items(), ("0.5", "tab:orange", "tab:blue"), strict=True):
        axes.scatter(values[order], range(len(order)), color=colour, label=name, zorder=2)
    axes.set_yticks(range(len(order)), [names[k] for k in order])
    axes.set(xlabel="ECE, held out", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
