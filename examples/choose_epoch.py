"""Which epoch's weights to calibrate: those of the least NLL, the best accuracy, or the least NLL after a temperature?

    python examples/choose_epoch.py

Small convnets are trained on scikit-learn's handwritten digits with noise in pixels, labels or both. In every training,
one ``CalibrationMonitor`` and three ``ModelCheckpoint`` keep the best weights by each of the three on a few hundred
validation images; all are then calibrated on those, and judged on the images that are left. The tables compare the
held-out NLL of trainings with the same seed.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from quickstart import LitDigits
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_clamp import CalibrationMonitor, fit_clamp
from lightning_clamp.metrics import Accuracy, negative_log_likelihood

CHOSEN_BY = {"nll": "min", "accuracy": "max", "refined_nll": "min"}
# Standard deviation that is added to pixels, which lie in [0, 1], and share of labels that are drawn at random.
NOISE = {"pixels": (0.5, 0.0), "labels": (0.0, 0.2), "pixels and labels": (0.4, 0.2)}


class Validated(LitDigits):
    """With a validation step as anyone would write it; the monitor reads what ``self(x)`` returns there."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        x, y = batch
        self.log("val/loss", F.cross_entropy(self(x), y))


def noisy_digits(seed: int, noise: str, n_val: int, n_train: int = 500) -> list[TensorDataset]:
    """Digits to train on, to choose an epoch by and to judge, all with the same noise."""
    of_pixels, of_labels = NOISE[noise]
    data, generator = load_digits(), torch.Generator().manual_seed(seed)
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images += of_pixels * torch.randn(images.shape, generator=generator)
    target = torch.tensor(data.target)
    wrong = torch.rand(len(target), generator=generator) < of_labels
    target[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    order = torch.randperm(len(target), generator=generator)
    parts = order.split([n_train, n_val, len(target) - n_train - n_val])
    return [TensorDataset(images[part], target[part]) for part in parts]


def chosen(seed: int, noise: str, n_val: int, epochs: int) -> dict[str, tuple[int, float, float]]:
    """Epoch, and held-out NLL before and after calibration, for the weights that each quantity chose."""
    seed_everything(seed, verbose=False)
    train, val, test = noisy_digits(seed, noise, n_val)
    with tempfile.TemporaryDirectory() as folder:
        keepers = {
            name: ModelCheckpoint(Path(folder, name), monitor=f"val/{name}", mode=mode, save_weights_only=True)
            for name, mode in CHOSEN_BY.items()
        }
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[CalibrationMonitor(metrics={"accuracy": Accuracy()}, diagram_every=0), *keepers.values()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        val_loader = DataLoader(val, batch_size=500)
        trainer.fit(Validated(width=16), DataLoader(train, batch_size=32, shuffle=True), val_loader)
        return {name: judged(keeper.best_model_path, val_loader, test) for name, keeper in keepers.items()}


def judged(path: str, val_loader: DataLoader, test: TensorDataset) -> tuple[int, float, float]:
    """Epoch of a checkpoint, and its NLL on the test set before and after calibration on the validation set."""
    epoch = int(torch.load(path, weights_only=True)["epoch"])
    network = Validated.load_from_checkpoint(path, map_location="cpu")
    result = fit_clamp(network, val_loader, method="temperature")
    inputs, target = test.tensors
    with torch.no_grad():
        logits = network.eval()(inputs)
    after = negative_log_likelihood(result.clamp.scale(logits), target)
    return epoch, float(negative_log_likelihood(logits, target)), float(after)


def table(runs: list[dict[str, tuple[int, float, float]]]) -> str:
    """Means over seeds; the difference to the choice by NLL, paired, with its standard error."""
    lines = ["| epoch chosen by | epoch | NLL | NLL, calibrated | against the least NLL |", "|---|---|---|---|---|"]
    for name in CHOSEN_BY:
        columns = torch.tensor([run[name] for run in runs], dtype=torch.float64)
        epoch, before, after = columns.mean(0).tolist()
        change = columns[:, 2] - torch.tensor([run["nll"][2] for run in runs], dtype=torch.float64)
        error = f" ± {float(change.std()) / len(runs) ** 0.5:.3f}" if len(runs) > 1 else ""
        against = "" if name == "nll" else f"{float(change.mean()):+.3f}{error}"
        lines.append(f"| `val/{name}` | {epoch:.0f} | {before:.3f} | {after:.3f} | {against} |")
    return "\n".join(lines)


def main() -> None:
    """Train for every noise and seed, and print a table for each noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--noise", nargs="+", choices=NOISE, default=list(NOISE))
    parser.add_argument("--n-val", type=int, default=400, help="images to choose an epoch by")
    arguments = parser.parse_args()
    # Sets of this size need no worker processes, whatever Lightning says.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*The number of training batches.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for noise in arguments.noise:
        runs = [chosen(seed, noise, arguments.n_val, arguments.epochs) for seed in range(arguments.seeds)]
        print(f"\nnoise in {noise}, {arguments.n_val} validation images, {arguments.seeds} seeds:\n\n{table(runs)}")


if __name__ == "__main__":
    main()
