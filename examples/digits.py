"""A model and its data for the command line: ``lightning-clamp fit --config examples/configs/digits.yaml``.

The data are scikit-learn's handwritten digits, 1,797 images that come with the package.
"""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split


class DigitsClassifier(LightningModule):
    """A convnet as anyone would write it; nothing in it knows of calibration.

    Args:
        width: Channels of the first layer.
        lr: Learning rate.
    """

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

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the NLL and the accuracy."""
        self._measure(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the NLL and the accuracy."""
        self._measure(batch, "test")

    def _measure(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, y = batch
        logits = self(x)
        accuracy = (logits.argmax(1) == y).float().mean()
        self.log_dict({f"{stage}/nll": F.cross_entropy(logits, y), f"{stage}/accuracy": accuracy}, sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Probabilities."""
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class DigitsData(LightningDataModule):
    """Few digits to train on, so that the network learns them by heart; the rest to validate, calibrate and test.

    Args:
        batch_size: Of the training set.
        n_train: Images to train on.
        n_val: Images to choose a model by.
        n_calibration: Images to calibrate on.
    """

    def __init__(self, batch_size: int = 32, n_train: int = 100, n_val: int = 200, n_calibration: int = 600) -> None:
        super().__init__()
        self.save_hyperparameters()
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
        everything = TensorDataset(images, torch.tensor(data.target))
        sizes = [n_train, n_val, n_calibration, len(images) - n_train - n_val - n_calibration]
        self.train, self.val, self.calibration, self.test = random_split(
            everything, sizes, torch.Generator().manual_seed(0)
        )

    def train_dataloader(self) -> DataLoader:
        """Training set."""
        return DataLoader(self.train, batch_size=self.hparams["batch_size"], shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation set."""
        return DataLoader(self.val, batch_size=200)

    def calibration_dataloader(self) -> DataLoader:
        """Calibration set: neither trained on nor used to choose the model."""
        return DataLoader(self.calibration, batch_size=200)

    def test_dataloader(self) -> DataLoader:
        """Test set."""
        return DataLoader(self.test, batch_size=200)

    def predict_dataloader(self) -> DataLoader:
        """Test set."""
        return self.test_dataloader()
