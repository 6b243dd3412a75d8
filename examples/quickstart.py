"""Train a small network on real images until it is over-confident, and come out calibrated.

    python examples/quickstart.py

The data are scikit-learn's handwritten digits, 1,797 images that come with the package. Everything is written to
``quickstart/``: TensorBoard logs, the calibrated checkpoint and a reliability diagram.
"""

import argparse
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from lightning_clamp import CalibrationModule, Clamp, NeuralClamping
from lightning_clamp.metrics import plot_reliability


class LitDigits(LightningModule):
    """A convnet as anyone would write it; nothing in it knows of calibration."""

    def __init__(self, width: int = 64, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(8 * width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


def digits(n_calibration: int = 800) -> tuple[Dataset, Dataset, Dataset]:
    """Few images to train on, so that the network learns them by heart; the rest to calibrate and to test."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    everything = TensorDataset(images, torch.tensor(data.target))
    sizes = [100, n_calibration, 1697 - n_calibration]
    train, calibration, test = random_split(everything, sizes, torch.Generator().manual_seed(0))
    return train, calibration, test


def main() -> None:
    """Train, calibrate, measure on held-out images with and without the clamp, and draw the reliability diagram."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("quickstart"))
    arguments = parser.parse_args()
    # Sets of this size need no worker processes, whatever Lightning says.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*The number of training batches.*")

    seed_everything(0)
    train, calibration, test = digits()
    clamping = NeuralClamping(DataLoader(calibration, batch_size=256))
    trainer = Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        callbacks=[clamping, ModelCheckpoint(arguments.out / "checkpoints")],
        logger=TensorBoardLogger(arguments.out),
    )
    model = LitDigits()
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))

    calibrated = CalibrationModule.from_checkpoint(clamping.checkpoint_path, LitDigits)
    uncalibrated = CalibrationModule(model, Clamp())
    compare(uncalibrated, calibrated, DataLoader(test, batch_size=256))
    before, after = clamping.result.reliability
    figure, _ = plot_reliability({"before": before, "after": after}, title="digits, calibration set")
    figure.savefig(arguments.out / "reliability.png", dpi=150)
    print(f"written: {arguments.out / 'reliability.png'}; logs: tensorboard --logdir {arguments.out}")


def compare(before: CalibrationModule, after: CalibrationModule, loader: DataLoader) -> None:
    """Print the metrics of both on images that neither training nor calibration has seen."""
    tester = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (one,), (other,) = (tester.test(module, loader, verbose=False) for module in (before, after))
    print(f"\n{'held-out test':<16}{'before':>10}{'after':>10}")
    for name, form in (("nll", ".4f"), ("ece", ".2%"), ("accuracy", ".2%")):
        print(f"{name:<16}{one[f'calibrated/{name}']:>10{form}}{other[f'calibrated/{name}']:>10{form}}")


if __name__ == "__main__":
    main()
