"""Do sharpness, margins and calibration error move together while a network trains?

    python examples/benchmarks/coupling.py

The question of "Too Sharp, Too Sure" (arXiv 2604.20614, table 1), asked of scikit-learn's digits: the paper's
network, an MLP of two hidden layers of 200 tanh units, learns 500 images by SGD or AdamW at four learning rates.
After every other epoch `SharpnessMonitor` measures the training images and held-out ones. Printed: Pearson's
correlation of the Gauss-Newton sharpness of the training images with the other numbers, over the whole training and
from its sharpest epoch on, mean and standard deviation over the learning rates. A picture of one run is written to
`--out`.
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from lightning_clamp.sharpness import SharpnessMonitor

RATES = {"SGD": (0.03, 0.06, 0.1, 0.2), "AdamW": (0.0003, 0.0006, 0.001, 0.002)}


class LitMLP(LightningModule):
    """Two hidden layers of 200 tanh units."""

    def __init__(self, optimizer: str, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD without momentum, or AdamW."""
        return getattr(torch.optim, self.hparams["optimizer"])(self.parameters(), lr=self.hparams["lr"])


def digits() -> tuple[Dataset, Dataset]:
    """500 images to train on and the others."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    everything = TensorDataset(images, torch.tensor(data.target))
    train, test = random_split(everything, [500, len(images) - 500], torch.Generator().manual_seed(0))
    return train, test


def watched(optimizer: str, lr: float, epochs: int) -> list[SharpnessMonitor]:
    """Train once; the monitors of the training images and of the held-out ones."""
    seed_everything(0, verbose=False)
    train, test = digits()
    monitors = [
        SharpnessMonitor(DataLoader(data, batch_size=500), name=name, every_n_epochs=2)
        for name, data in (("train", train), ("held_out", test))
    ]
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=monitors,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitMLP(optimizer, lr), DataLoader(train, batch_size=50, shuffle=True))
    return monitors


def correlation(sharp: SharpnessMonitor, other: SharpnessMonitor, name: str, late: bool) -> float:
    """Pearson's correlation of one monitor's sharpness with the other's number; if late, from the sharpest epoch on."""
    pairs = torch.tensor([[one["sharpness"], two[name]] for one, two in zip(sharp.history, other.history, strict=True)])
    return float(torch.corrcoef(pairs[pairs[:, 0].argmax() if late else 0 :].T)[0, 1])


def main() -> None:
    """Print the correlations and draw one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("coupling"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*The number of training batches.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # Lightning's own, about torch
    # Matrices of this size: several threads would wait for each other longer than they work.
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)

    runs = {name: [watched(name, lr, arguments.epochs) for lr in rates] for name, rates in RATES.items()}
    print("| sharpness with | " + " | ".join(RATES) + " |\n|---|" + "---|" * len(RATES))
    rows = [("ECE, training images", 0, "ece"), ("margin tail, training images", 0, "margin_tail")]
    rows += [("ECE, held-out images", 1, "ece"), ("margin tail, held-out images", 1, "margin_tail")]
    for late, stretch in ((False, "whole training"), (True, "from the sharpest epoch on")):
        for label, which, number in rows:
            cells = []
            for monitors in runs.values():
                found = torch.tensor([correlation(pair[0], pair[which], number, late) for pair in monitors])
                cells.append(f"{found.mean():+.2f} ± {found.std():.2f}")
            print(f"| {label}, {stretch} | " + " | ".join(cells) + " |")
    figure = runs["SGD"][2][0].plot()
    figure.savefig(arguments.out / "coupling.png", dpi=150)
    print(f"written: {arguments.out / 'coupling.png'}")


if __name__ == "__main__":
    main()
