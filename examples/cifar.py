"""CIFAR-10 or CIFAR-100 with a ResNet: train, and come out calibrated.

    python examples/cifar.py --data-dir DIR --download
    python examples/cifar.py --data-dir DIR --dataset cifar100 --epochs 100 --precision bf16-mixed

Nothing is downloaded without ``--download``. 5,000 of the training images are held out for calibration; the test set is
used once, at the end, with and without the clamp.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.models import resnet18
from torchvision.transforms import v2

from lightning_clamp import CalibrationModule, Clamp, NeuralClamping

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HELD_OUT = 5000


class CifarData(LightningDataModule):
    """45,000 augmented images to train on, 5,000 plain ones to calibrate on, and the test set."""

    def __init__(self, dataset: str, folder: Path, batch_size: int, workers: int, download: bool) -> None:
        super().__init__()
        self.source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
        self.folder, self.batch_size, self.workers, self.download = folder, batch_size, workers, download

    def prepare_data(self) -> None:
        """Download, if asked to."""
        if self.download:
            self.source(self.folder, download=True)

    def setup(self, stage: str) -> None:
        """Split the training images; only those that train the network are augmented."""
        plain = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        augmented = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *plain])
        order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0)).tolist()
        self.train = Subset(self.source(self.folder, transform=augmented), order[HELD_OUT:])
        self.calibration = Subset(self.source(self.folder, transform=v2.Compose(plain)), order[:HELD_OUT])
        self.test = self.source(self.folder, train=False, transform=v2.Compose(plain))

    def _loader(self, data: torch.utils.data.Dataset, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            data, self.batch_size, shuffle=shuffle, num_workers=self.workers, persistent_workers=self.workers > 0
        )

    def train_dataloader(self) -> DataLoader:
        """Augmented and shuffled."""
        return self._loader(self.train, shuffle=True)

    def calibration_dataloader(self) -> DataLoader:
        """What NeuralClamping looks for."""
        return self._loader(self.calibration)

    def test_dataloader(self) -> DataLoader:
        """The test set."""
        return self._loader(self.test)


class LitResNet(LightningModule):
    """torchvision's ResNet-18 with a stem for small images."""

    def __init__(self, num_classes: int, lr: float, epochs: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = resnet18(num_classes=num_classes)
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        """SGD with a cosine schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["epochs"])
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def main() -> None:
    """Train, calibrate and test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("cifar10", "cifar100"), default="cifar10")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the data set")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--devices", default="1", help="as in Trainer(devices=...)")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--out", type=Path, default=Path("cifar"))
    parser.add_argument("--fast-dev-run", action="store_true", help="one batch of everything")
    arguments = parser.parse_args()

    seed_everything(0)
    data = CifarData(arguments.dataset, arguments.data_dir, arguments.batch_size, arguments.workers, arguments.download)
    clamping = NeuralClamping()
    trainer = Trainer(
        max_epochs=arguments.epochs,
        devices=int(arguments.devices) if arguments.devices.lstrip("-").isdigit() else arguments.devices,
        strategy=arguments.strategy,
        precision=arguments.precision,
        callbacks=[clamping, ModelCheckpoint(arguments.out / "checkpoints"), LearningRateMonitor()],
        logger=TensorBoardLogger(arguments.out),
        fast_dev_run=arguments.fast_dev_run,
    )
    model = LitResNet(10 if arguments.dataset == "cifar10" else 100, arguments.lr, arguments.epochs)
    trainer.fit(model, data)
    print("\nTest set, uncalibrated, then calibrated:")
    calibrated = clamping.calibrated_module()
    for module in (CalibrationModule(calibrated.network, Clamp()), calibrated):
        trainer.test(module, data)


if __name__ == "__main__":
    main()
