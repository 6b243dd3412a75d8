"""Which pixels belong to an object, and how sure is the network at its edge? Four losses, with and without a clamp.

    python examples/segmentation.py
    python examples/segmentation.py --data DIR --size 128

A small U-Net with one logit per pixel is trained with plain binary cross-entropy (``bce``), with labels that are
inverted at random for a fixed share of the images (``sc-bce``) or for a learned one (``aslp``), and with a penalty on
large logits (``acls``); then each is calibrated. Without ``--data`` the images are blurred ellipses whose true border
no network can know. DIR holds a ``load.py`` with ``nuclei()``: images, uint8 (N, 256, 256, 3), and masks, bool
(N, 256, 256). The table is printed; ``confidence.png`` and ``reliability.png`` are written to ``segmentation/``.
"""

import argparse
import importlib.util
import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split
from torchmetrics import MetricCollection

from lightning_clamp import NeuralClamping
from lightning_clamp.losses import ACLSMixin, ASLPMixin, Indexed, SCBCEMixin
from lightning_clamp.metrics import (
    Accuracy,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    OverconfidenceError,
    ReliabilityDiagram,
    plot_reliability,
)

# The network


def double_convolution(before: int, after: int) -> nn.Sequential:
    """Two 3×3 convolutions."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Two levels, one logit per pixel (Ronneberger et al., 2015, much smaller)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = double_convolution(3, width)
        self.middle = double_convolution(width, 2 * width)
        self.coarse = double_convolution(2 * width, 2 * width)
        self.up_middle = double_convolution(4 * width, width)
        self.up_fine = double_convolution(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 1, H, W)`` of images ``(N, 3, H, W)``; H and W multiples of 4."""
        fine = self.fine(x)
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.up_middle(torch.cat([F.interpolate(coarse, scale_factor=2), middle], 1))
        return self.head(self.up_fine(torch.cat([F.interpolate(middle, scale_factor=2), fine], 1)))


class LitSegmenter(LightningModule):
    """Segmentation as anyone would write it; nothing in it knows of calibration."""

    def __init__(self, width: int = 12, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = UNet(width)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, H, W)``."""
        return self.net(x)[:, 0]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Binary cross-entropy."""
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x), y.float())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Share of the pixels that are right."""
        x, y = batch
        self.log("val_accuracy", ((self(x) > 0) == y).float().mean())

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits of a batch of images, masks left aside."""
        return self(batch[0])

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam, with a cosine schedule: at a constant rate the last epoch is a matter of luck."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class WithSCBCE(SCBCEMixin, LitSegmenter):
    """The same, trained on labels of which a fixed share is inverted."""


class WithASLP(ASLPMixin, LitSegmenter):
    """The same, where the share is learned for each image."""


class WithACLS(ACLSMixin, LitSegmenter):
    """The same, with a penalty on logits beyond a margin."""


# By name, from the number of epochs.
LOSSES: dict[str, Callable[[int], LitSegmenter]] = {
    "bce": lambda epochs: LitSegmenter(),
    # Labels are right with probability 1 - alpha, and so sure the network learns to be at most.
    "sc-bce": lambda epochs: WithSCBCE(sc_bce_alpha=0.03),
    # As in the official code, which waits for 5 of 30.
    "aslp": lambda epochs: WithASLP(aslp_warmup_epochs=epochs // 6),
    # Logits beyond ±4 cost something, probabilities beyond .98: one logit z counts as the pair (-z/2, z/2).
    "acls": lambda epochs: WithACLS(loss_task="binary", acls_margin=2.0),
}


# The images


class Data(NamedTuple):
    """Images ``(3, H, W)`` in [0, 1] with masks ``(H, W)``, int64: to train, to choose α, to calibrate, to measure."""

    train: Subset
    validation: Subset
    calibration: Subset
    test: Subset


def read(folder: Path | None, size: int) -> Data:
    """The nuclei in a folder, or ellipses: few to train on, so that the network learns them by heart."""
    images, masks = ellipses(320, size) if folder is None else nuclei(folder, size)
    shares = [0.1, 0.1, 0.2, 0.6]
    return Data(*random_split(TensorDataset(images, masks), shares, torch.Generator().manual_seed(0)))


def nuclei(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """Microscopy images and where the nuclei are, reduced to ``size``."""
    specification = importlib.util.spec_from_file_location("segmentation_data", folder / "load.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    images, masks = (torch.from_numpy(array) for array in module.nuclei())
    images = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, size)
    return images, (F.adaptive_avg_pool2d(masks[:, None].float(), size)[:, 0] > 0.5).long()


def ellipses(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images of four blurred, noisy ellipses each, and masks whose border lies somewhere in the blur.

    The size that an ellipse has in the mask differs from the one it has in the image, as if drawn by hand, so that
    pixels at the edge are uncertain for good: a network that is sure there has learned its training masks by heart.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    axis = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    away = grid - uniform(-0.8, 0.8, 4, 2, 1, 1)
    angle = uniform(0, math.pi, 4, 1, 1)
    along = away[:, :, 0] * angle.cos() + away[:, :, 1] * angle.sin()
    across = away[:, :, 1] * angle.cos() - away[:, :, 0] * angle.sin()
    # 1 on the border of the ellipse.
    radius = (along / uniform(0.15, 0.4, 4, 1, 1)).hypot(across / uniform(0.15, 0.4, 4, 1, 1))
    seen = torch.sigmoid((1 - radius) / uniform(0.03, 0.2, 4, 1, 1)).amax(1)
    masks = (radius < uniform(0.75, 1.25, 4, 1, 1)).any(1).long()
    tint = uniform(0.3, 0.6, 3, 1, 1) * seen[:, None]
    noise = 0.12 * torch.randn(count, 3, size, size, generator=generator)
    return (0.25 + tint + noise).clamp(0, 1), masks


# Training, calibrating and measuring


class Outcome(NamedTuple):
    """Logits ``(N, H, W)`` of the test images, as trained and calibrated, and how long either took."""

    trained: Tensor
    clamped: Tensor
    training_seconds: float
    clamping_seconds: float


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer that writes and shows nothing."""
    return Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options
    )


def run(loss: str, seed: int, data: Data, options: argparse.Namespace) -> Outcome:
    """Train with a loss, calibrate, and predict the test images both ways."""
    seed_everything(seed, verbose=False)
    model = LOSSES[loss](options.epochs)
    train = Indexed(data.train) if isinstance(model, ASLPMixin) else data.train
    validation, calibration, test = (DataLoader(part, batch_size=32) for part in data[1:])
    clamping = NeuralClamping(calibration, task="binary", grids=options.grids, on_error="raise")
    bare, clamped = (
        quiet_trainer(max_epochs=options.epochs, accelerator=options.accelerator, callbacks=callbacks)
        for callbacks in ([], [clamping])
    )
    started = time.perf_counter()
    clamped.fit(model, DataLoader(train, batch_size=8, shuffle=True), validation)
    seconds = time.perf_counter() - started - clamping.result.seconds
    learned = f", α = {model.aslp_alphas.values.mean():.3f} in the end" if isinstance(model, ASLPMixin) else ""
    print(f"{loss}, seed {seed}: {seconds:.0f} s{learned}; clamp: {clamping.result.reason.split(' (')[0]}", flush=True)
    before, after = (torch.cat(trainer.predict(model, test)) for trainer in (bare, clamped))
    return Outcome(before, after, seconds, clamping.result.seconds)


def scores(logits: Tensor, target: Tensor) -> dict[str, float]:
    """What the table shows, over all pixels; Dice is that of the foreground."""
    metrics = MetricCollection(
        {
            "accuracy": Accuracy(task="binary"),
            "nll": NegativeLogLikelihood(task="binary"),
            "ece": ExpectedCalibrationError(task="binary"),
            "overconfidence": OverconfidenceError(task="binary"),
        }
    )
    predicted = logits > 0
    dice = 2 * (predicted & (target == 1)).sum() / (predicted.sum() + target.sum())
    return {name: float(value) for name, value in metrics(logits, target).items()} | {"dice": float(dice)}


COLUMNS = {
    "accuracy": ".2%", "dice": ".3f", "nll": ".4f", "ece": ".2%", "overconfidence": ".2%", "seconds": ".1f",
}  # fmt: skip


def print_table(outcomes: dict[str, list[Outcome]], target: Tensor) -> None:
    """One row for every loss as trained and one calibrated, means over the seeds."""
    print(f"\n{'held-out test':<18}" + "".join(f"{name:>16}" for name in COLUMNS))
    for loss, runs in outcomes.items():
        trained = [scores(one.trained, target) | {"seconds": one.training_seconds} for one in runs]
        clamped = [scores(one.clamped, target) | {"seconds": one.clamping_seconds} for one in runs]
        for name, rows in ((loss, trained), ("  + clamp", clamped)):
            means = {column: sum(row[column] for row in rows) / len(rows) for column in COLUMNS}
            print(f"{name:<18}" + "".join(f"{means[column]:>16{form}}" for column, form in COLUMNS.items()))


# Pictures


def draw_maps(outcomes: dict[str, Outcome], data: Data, target: Tensor, n_images: int = 3) -> Figure:
    """How sure each network is as trained, and how sure it is where it is wrong."""
    wrong = torch.stack([(outcome.trained > 0) != target for outcome in outcomes.values()])
    # From an image that is of medium difficulty to these networks to one of the hardest.
    order = wrong.float().mean((0, 2, 3)).argsort()
    chosen = order[torch.linspace(0.5, 0.95, n_images).mul(len(order) - 1).long()].tolist()
    size = (1.75 * (1 + len(outcomes)) + 0.9, 3.75 * n_images)
    figure, axes = plt.subplots(2 * n_images, 1 + len(outcomes), figsize=size, squeeze=False, layout="constrained")
    for upper, lower, index in zip(axes[::2], axes[1::2], chosen, strict=True):
        image, mask = data.test[index]
        upper[0].imshow(image.permute(1, 2, 0))
        lower[0].imshow(mask, cmap="gray", interpolation="nearest")
        upper[0].set(ylabel="image, confidence")
        lower[0].set(ylabel="mask, wrong pixels")
        for column, outcome in enumerate(outcomes.values(), start=1):
            sure, surely_wrong = draw_pair(upper[column], lower[column], outcome.trained[index], mask)
        figure.colorbar(sure, ax=upper[-1], label="confidence")
        figure.colorbar(surely_wrong, ax=lower[-1], label="confidence")
    for ax, name in zip(axes[0], ["", *outcomes], strict=True):
        ax.set_title(name, fontweight="bold")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return figure


def draw_pair(upper: Axes, lower: Axes, logits: Tensor, mask: Tensor) -> tuple[AxesImage, AxesImage]:
    """The confidence of one image, and below it that of the pixels that are wrong, the others blank."""
    confidence = logits.abs().sigmoid()
    wrong = (logits > 0) != mask
    shared = {"vmin": 0.5, "vmax": 1, "interpolation": "nearest"}
    sure = upper.imshow(confidence, cmap="viridis", **shared)
    surely_wrong = lower.imshow(
        confidence.where(wrong, torch.nan), cmap=plt.get_cmap("YlOrRd").with_extremes(bad="#dde3ea"), **shared
    )
    upper.set_xlabel(f"sure {confidence.mean():.1%}, right {1 - wrong.float().mean():.1%}", fontsize="small")
    return sure, surely_wrong


def draw_reliability(outcomes: dict[str, Outcome], target: Tensor) -> Figure:
    """One diagram for every loss: bars are calibrated, the line is as trained."""
    size = (4.2 * len(outcomes), 5)
    figure, axes = plt.subplots(1, len(outcomes), figsize=size, squeeze=False, layout="constrained")
    for ax, (loss, outcome) in zip(axes[0], outcomes.items(), strict=True):
        diagram = ReliabilityDiagram(task="binary")
        before, after = (diagram.forward(logits, target) for logits in (outcome.trained, outcome.clamped))
        plot_reliability({"before": before, "after": after}, ax=ax, title=loss)
        # The larger of two probabilities is at least a half.
        ax.set_xlim(0.5, 1)
    return figure


def main() -> None:
    """Train with every loss, calibrate, compare on held-out images, and draw."""
    options = parsed()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Sets of this size need no worker processes, whatever Lightning says.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*The number of training batches.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")

    data = read(options.data, options.size)
    target = torch.stack([mask for _, mask in data.test])
    print(", ".join(f"{len(part)} images for {name}" for name, part in zip(Data._fields, data, strict=True)))
    outcomes = {loss: [run(loss, seed, data, options) for seed in range(options.seeds)] for loss in options.losses}
    print_table(outcomes, target)
    firsts = {loss: runs[0] for loss, runs in outcomes.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    draw_maps(firsts, data, target).savefig(options.out / "confidence.png", dpi=110)
    draw_reliability(firsts, target).savefig(options.out / "reliability.png", dpi=110)
    print(f"\nwritten: {options.out / 'confidence.png'} and {options.out / 'reliability.png'}")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with load.py; by default ellipses are drawn")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side, a multiple of 4 (default 64)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of every loss; the table has their mean")
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help=", ".join(LOSSES)
    )
    parser.add_argument(
        "--grids", type=int, nargs="*", default=[], help="perturb the input too (1 2 4: many passes instead of one)"
    )
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("segmentation"))
    options = parser.parse_args()
    if options.size % 4:
        parser.error(f"--size must be a multiple of 4, which the U-Net halves twice, got {options.size}.")
    return options


if __name__ == "__main__":
    main()
