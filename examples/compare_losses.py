"""Calibrate afterwards, or train calibrated? One network, trained with every loss, measured before and after the clamp.

    python examples/compare_losses.py
    python examples/compare_losses.py --losses ce focal calmo --seeds 5 --optimizer adamw
    python examples/compare_losses.py --dataset cifar10 --data DIR --download
    python examples/compare_losses.py --dataset cifar10 --data cifar10.npz --accelerator cuda --minutes 8

The digits of scikit-learn need no download and take a few minutes without a GPU: a convnet learns 200 of them by heart,
its last weights are measured, and 700 other images calibrate.

CIFAR-10 follows Tables 2 and A2 of "Too Sharp, Too Sure" (arXiv 2604.20614), whose numbers are printed beside:
ResNet-20, 45,000 images, 10,000 steps of 128, the weights of the step with the lowest validation loss. Where the paper
is silent: momentum 0.9 for SGD, PyTorch's defaults for AdamW, a constant learning rate, no augmentation, 40 validations
in a training, cross-entropy as the validation loss of every training, and the baselines' own options. The 5,000 images
that choose the step also calibrate. The images are torchvision's folder, or a file of NumPy arrays x_train, y_train,
x_test and y_test (uint8, N×32×32×3).

On a GPU the steps of a training are recorded as a CUDA graph and replayed, see cuda_graph.py, instead of compiled;
those of losses that learn as they train (CRL, AdaFocal, CALS) run one by one. ``--minutes`` starts no other training
after that time: those of the paper come first, and the table holds what was done.

All losses have the options that the package gives them, and a seed means the same initial weights and order of the data
for each of them. Metrics are those of test images that nothing else has seen. The seconds are those of training without
its validations, and then those of the calibration.

Everything is written to ``compare_losses/``: the table, comparison.md, and a picture, comparison.png.
"""

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from cuda_graph import RecordedSteps
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection

from lightning_clamp import CalibrationModule, Clamp, NeuralClamping
from lightning_clamp.losses import (
    ACLSMixin,
    AdaFocalMixin,
    BrierMixin,
    CALSMixin,
    CPCMixin,
    CRLMixin,
    DCAMixin,
    DualFocalMixin,
    EntropyPenaltyMixin,
    FLSDMixin,
    FocalMixin,
    LabelSmoothingMixin,
    LossMixin,
    MarginAwareMixin,
    MbLSMixin,
    MDCAMixin,
    MMCEMixin,
)
from lightning_clamp.metrics import (
    Accuracy,
    AdaptiveCalibrationError,
    ClasswiseCalibrationError,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
)

Scores: TypeAlias = Mapping[str, float]
# For each loss, by its name in the table, one pair for each seed: as trained, then clamped.
Results: TypeAlias = dict[str, list[tuple[Scores, Scores]]]


class LitClassifier(LightningModule):
    """A classifier as anyone would write it; nothing in it knows of calibration."""

    def __init__(self, network: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.network = network
        self.optimizer_name = optimizer

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy; the third part of a batch is the images' index, for losses that keep something for each."""
        x, y, _ = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross-entropy too, whatever the training step is."""
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD or AdamW at a constant rate, those of the paper."""
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=0.001)


class LitACLS(ACLSMixin, LitClassifier):
    """The classifier, trained with ACLS: the mixin's ``training_step`` takes the place of the classifier's."""


def trained_with(mixin: type[LossMixin]) -> type[LitClassifier]:
    """The same two lines for any mixin, since there are a dozen of them here."""
    return type(f"{mixin.__name__}Classifier", (mixin, LitClassifier), {})


class Loss(NamedTuple):
    """A row of the table.

    Attributes:
        label: Its name there.
        module: What is trained.
        options: Of its mixin.
        learns: Whether the loss changes while it trains, so that its steps cannot be recorded.
    """

    label: str
    module: type[LitClassifier]
    options: Mapping[str, Any] = {}
    learns: bool = False


LitCalMO = trained_with(MarginAwareMixin)
# The paper's first, in its order.
LOSSES = {
    "ce": Loss("cross-entropy", LitClassifier),
    "flat": Loss("CalMO, Flat.", LitCalMO, {"margin_lambda_r": 0.0}),
    "rob": Loss("CalMO, Rob.", LitCalMO, {"margin_lambda_s": 0.0}),
    "calmo": Loss("CalMO", LitCalMO),
    "smoothing": Loss("label smoothing", trained_with(LabelSmoothingMixin)),
    "focal": Loss("focal", trained_with(FocalMixin)),
    "entropy": Loss("entropy penalty", trained_with(EntropyPenaltyMixin)),
    "flsd": Loss("FLSD", trained_with(FLSDMixin)),
    "dual_focal": Loss("dual focal", trained_with(DualFocalMixin)),
    "mbls": Loss("MbLS", trained_with(MbLSMixin)),
    "mdca": Loss("MDCA", trained_with(MDCAMixin)),
    "dca": Loss("DCA", trained_with(DCAMixin)),
    "mmce": Loss("MMCE", trained_with(MMCEMixin)),
    "brier": Loss("Brier", trained_with(BrierMixin)),
    "acls": Loss("ACLS", LitACLS),
    "cpc": Loss("CPC", trained_with(CPCMixin)),
    "crl": Loss("CRL", trained_with(CRLMixin), learns=True),
    "adafocal": Loss("AdaFocal", trained_with(AdaFocalMixin), learns=True),
    "cals": Loss("CALS", trained_with(CALSMixin), learns=True),
}
# Tables 2 and A2 of the paper: test accuracy in percent and ECE, mean ± standard deviation over three seeds.
PAPER = {
    "sgd": {
        "ce": "75.2 ± 1.2, .081 ± .021",
        "flat": "80.8 ± 0.1, .053 ± .003",
        "rob": "78.2 ± 0.9, .062 ± .011",
        "calmo": "80.1 ± 1.4, .056 ± .001",
        "smoothing": "81.0 ± 1.0, .082 ± .009",
        "focal": "78.0 ± 2.9, .029 ± .018",
    },
    "adamw": {
        "ce": "80.7 ± 0.4, .061 ± .007",
        "flat": "83.3 ± 0.9, .047 ± .002",
        "rob": "82.4 ± 0.2, .039 ± .009",
        "calmo": "83.2 ± 1.1, .045 ± .007",
        "smoothing": "85.8 ± 0.1, .059 ± .002",
        "focal": "80.5 ± 1.3, .042 ± .019",
    },
}


class Task(NamedTuple):
    """Images in three parts, the same for all seeds, and how a network is trained on them.

    Attributes:
        train: What the network learns from.
        held_out: What chooses among its weights, and calibrates.
        test: What is measured.
        mean: What was subtracted from images in [0, 1], per channel.
        std: What they were then divided by.
        network: Makes a network with new weights.
        batch_size: Images in a step.
        steps: Steps of training, unless told otherwise.
        weights: Which weights are measured and calibrated.
    """

    train: TensorDataset
    held_out: TensorDataset
    test: TensorDataset
    mean: tuple[float, ...]
    std: tuple[float, ...]
    network: Callable[[], nn.Module]
    batch_size: int
    steps: int
    weights: Literal["last", "best"]


def parts_of(images: Tensor, target: Tensor, sizes: Sequence[int]) -> list[TensorDataset]:
    """Parts of these sizes, drawn at random, always the same ones."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [TensorDataset(images[part], target[part]) for part in order.split(list(sizes))]


def normalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Images ``(N, C, H, W)`` in [0, 1] as the network takes them."""
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def digits() -> Task:
    """Few images to train on, so that the network learns them by heart; the rest to calibrate and to test."""
    data = load_digits()
    mean, std = (0.305,), (0.376,)
    images = normalized(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, mean, std)
    parts = parts_of(images, torch.tensor(data.target), [200, 700, 897])
    return Task(*parts, mean, std, convnet, batch_size=25, steps=400, weights="last")


def cifar10(path: Path, download: bool) -> Task:
    """CIFAR-10 as in the paper; a tenth of the training images is held out."""
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    arrays = dict(np.load(path)) if path.suffix == ".npz" else downloaded(path, download)
    pairs = []
    for part in ("train", "test"):
        images = torch.from_numpy(arrays[f"x_{part}"]).permute(0, 3, 1, 2) / 255
        pairs.append((normalized(images, mean, std), torch.from_numpy(arrays[f"y_{part}"]).long()))
    n = len(pairs[0][1])
    parts = [*parts_of(*pairs[0], [n - n // 10, n // 10]), TensorDataset(*pairs[1])]
    return Task(*parts, mean, std, resnet20, batch_size=128, steps=10_000, weights="best")


def downloaded(folder: Path, download: bool) -> dict[str, np.ndarray]:
    """The arrays of torchvision's folder."""
    from torchvision.datasets import CIFAR10  # here, for the digits do without torchvision

    arrays = {}
    for part in ("train", "test"):
        data = CIFAR10(folder, train=part == "train", download=download)
        arrays |= {f"x_{part}": data.data, f"y_{part}": np.array(data.targets)}
    return arrays


def convnet(width: int = 32) -> nn.Module:
    """Two convolutions and a linear layer, for the digits' 8×8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut without weights (option A): every second pixel, channels of zeros."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = after // before
        self.added = (after - before) // 2
        self.layers = nn.Sequential(
            nn.Conv2d(before, after, 3, self.stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(self.layers(x) + shortcut)


def resnet20() -> nn.Module:
    """ResNet-20 for CIFAR (He et al., 2016, section 4.2)."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        *(Block(before, after) for before, after in pairwise(widths)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Batches:
    """A loader of tensors that lie on a device: nothing is copied, and no image is read alone."""

    def __init__(self, data: TensorDataset, size: int, device: torch.device, *, shuffle: bool = False) -> None:
        self.tensors = [tensor.to(device) for tensor in data.tensors]
        self.size, self.device, self.shuffle = size, device, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self.tensors[0]) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n = len(self.tensors[0])
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        for part in order.to(self.device).split(self.size):
            yield tuple(tensor[part] for tensor in self.tensors)


class Plan(NamedTuple):
    """What is trained, and how.

    Attributes:
        names: Losses, keys of :data:`LOSSES`.
        seeds: Trainings with each.
        optimizer: ``"sgd"`` or ``"adamw"``.
        steps: Optimizer steps of a training.
        accelerator: As in ``Trainer(accelerator=...)``.
        minutes: No training but the first starts later.
    """

    names: Sequence[str]
    seeds: int
    optimizer: str
    steps: int
    accelerator: str
    minutes: float


def compare(task: Task, plan: Plan) -> Iterator[Results]:
    """Train with each loss from each seed; says so and gives what there is after every training."""
    results: Results = {}
    started = time.monotonic()
    # Seed by seed, so that a run that is stopped has seen every loss.
    for seed in range(plan.seeds):
        for label, module, options, learns in (LOSSES[name] for name in plan.names):
            if results and time.monotonic() - started > 60 * plan.minutes:
                print(f"{plan.minutes:g} minutes are over: {label} of seed {seed} and what follows is left out.")
                return
            if issubclass(module, MarginAwareMixin):
                # Its radius is one of images in [0, 1]: it has to know how they were normalised.
                options = {**options, "margin_mean": task.mean, "margin_std": task.std}
            torch.manual_seed(seed)
            trained, clamped = run(module(task.network(), plan.optimizer, **options), task, plan, learns)
            results.setdefault(label, []).append((trained, clamped))
            print(
                f"seed {seed}  {label:<16} {trained['seconds']:7.1f} s   accuracy {trained['accuracy']:.2%}"
                f"   ECE {trained['ece']:.2%}, clamped {clamped['ece']:.2%}",
                flush=True,
            )
            yield results


def run(model: LitClassifier, task: Task, plan: Plan, learns: bool) -> tuple[Scores, Scores]:
    """Train and calibrate once; returns the scores on the test images as trained, and then clamped."""
    on_gpu = plan.accelerator == "cuda"
    device = torch.device("cuda:0" if on_gpu else "cpu")
    indexed = TensorDataset(*task.train.tensors, torch.arange(len(task.train)))
    train = Batches(indexed, task.batch_size, device, shuffle=True)
    held_out, test = (Batches(data, 500, device) for data in (task.held_out, task.test))
    clamping = NeuralClamping(held_out, weights=task.weights, on_error="raise")
    timer = Timer()
    with TemporaryDirectory() as folder:
        checkpoint = ModelCheckpoint(folder, monitor="val_loss", save_weights_only=True)
        trainer = Trainer(
            accelerator=plan.accelerator,
            devices=1,
            strategy=RecordedSteps(device) if on_gpu and not learns else "auto",
            benchmark=on_gpu,
            max_steps=plan.steps,
            val_check_interval=max(1, plan.steps // 40),
            check_val_every_n_epoch=None,
            callbacks=[clamping, checkpoint, timer],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, train, held_out)
        clamped = clamping.calibrated_module()
    trained = CalibrationModule(clamped.network, Clamp())
    seconds = timer.time_elapsed("train") - timer.time_elapsed("validate")
    return (
        {**scores(trainer, trained, test), "seconds": seconds},
        {**scores(trainer, clamped, test), "seconds": clamping.result.seconds},
    )


def scores(trainer: Trainer, module: CalibrationModule, loader: Batches) -> Scores:
    """The metrics of a module's logits."""
    logits = torch.cat(trainer.predict(module, loader))
    target = torch.cat([target for _, target in loader]).to(logits.device)
    metrics = MetricCollection(
        {
            "accuracy": Accuracy(),
            "nll": NegativeLogLikelihood(),
            "ece": ExpectedCalibrationError(),
            "adaptive_ece": AdaptiveCalibrationError(),
            "classwise_ece": ClasswiseCalibrationError(logits.shape[1]),
        }
    )
    return {name: float(value) for name, value in metrics.to(logits.device)(logits, target).items()}


class Column(NamedTuple):
    """A column of numbers: heading, what they are multiplied by, and digits after the point."""

    heading: str
    scale: float
    digits: int


COLUMNS = {
    "accuracy": Column("accuracy %", 100, 2),
    "nll": Column("NLL", 1, 3),
    "ece": Column("ECE %", 100, 2),
    "adaptive_ece": Column("adaptive ECE %", 100, 2),
    "classwise_ece": Column("classwise ECE %", 100, 2),
    "seconds": Column("seconds", 1, 1),
}


def average(runs: Sequence[Scores], name: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds, in the units of the column; one seed has no deviation."""
    values = [run[name] * COLUMNS[name].scale for run in runs]
    return mean(values), stdev(values) if len(values) > 1 else math.nan


def table(results: Results, paper: Mapping[str, str]) -> str:
    """Markdown that is aligned for the terminal too: two lines for each loss, as trained and then clamped.

    Args:
        results: What was measured.
        paper: What the paper has, by the loss's name in the table; no column where that is empty.
    """
    rows = [["loss", "", *(column.heading for column in COLUMNS.values()), "seeds"]]
    for label, pairs in results.items():
        for state, runs in zip(("as trained", "then clamped"), zip(*pairs, strict=True), strict=True):
            name = label if state == "as trained" else ""
            rows.append([name, state, *(cell(runs, column) for column in COLUMNS), str(len(runs))])
    if paper:
        rows = [[*row, "the paper's" if row is rows[0] else paper.get(row[0], "")] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(line(row, widths) for row in (rows[0], rule, *rows[1:]))


def cell(runs: Sequence[Scores], name: str) -> str:
    """``mean ± deviation``, or the one number that there is."""
    center, spread = average(runs, name)
    digits = COLUMNS[name].digits
    return f"{center:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line of the table: two columns of words, then numbers, which go to the right."""
    words = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return f"| {' | '.join(words + numbers)} |"


def draw(results: Results, title: str, path: Path) -> None:
    """ECE and NLL of every loss, as trained (hollow) and then clamped (filled)."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.8 + 0.36 * len(results)), sharey=True, layout="constrained")
    for ax, name in zip(axes, ("ece", "nll"), strict=True):
        draw_column(ax, results, name)
    axes[0].set_yticks(range(len(results)), list(results))
    axes[0].set_ylim(len(results) - 0.5, -0.5)
    figure.suptitle(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_column(ax: Axes, results: Results, name: str) -> None:
    """One of the numbers, with a line where cross-entropy and a clamp would be."""
    styles = ("as trained", "white", "#b5532a"), ("then clamped", "#2a6fb5", "#2a6fb5")
    for state, (label, face, color) in enumerate(styles):
        numbers = [average([pair[state] for pair in pairs], name) for pairs in results.values()]
        centers, spreads = zip(*numbers, strict=True)
        # One a little above the other: they often coincide.
        places = [row + 0.26 * state - 0.13 for row in range(len(results))]
        ax.errorbar(centers, places, xerr=spreads, fmt="o", color=color, markerfacecolor=face, label=label, capsize=2)
    if LOSSES["ce"].label in results:
        reference, _ = average([clamped for _, clamped in results[LOSSES["ce"].label]], name)
        ax.axvline(reference, color="#2a6fb5", linestyle=":", linewidth=1, label="cross-entropy, then clamped")
    ax.set_xlabel(f"{COLUMNS[name].heading}, test images")
    ax.set_xlim(left=0)
    ax.grid(axis="x", alpha=0.3)


def positive(text: str) -> int:
    """A number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}.")
    return value


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--data", type=Path, help="of CIFAR-10: torchvision's folder, or a .npz file")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10")
    known = f"some of: {', '.join(LOSSES)}"
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="NAME", help=known)
    parser.add_argument("--seeds", type=positive, default=3, help="number of trainings with each loss")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="rate 0.01 or 0.001")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, help="length of a training")
    length.add_argument(
        "--steps", type=positive, help="the same in optimizer steps (400 for digits, 10,000 for cifar10)"
    )
    parser.add_argument(
        "--accelerator",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: steps are recorded as a CUDA graph and replayed, which takes the place of torch.compile",
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no other training later than this")
    parser.add_argument("--out", type=Path, default=Path("compare_losses"))
    arguments = parser.parse_args()
    if arguments.dataset == "cifar10" and arguments.data is None:
        parser.error("--dataset cifar10 needs --data DIR (and --download, if CIFAR-10 is not there yet).")
    return arguments


def be_quiet() -> None:
    """A line for each training is enough: no banners, and no advice that does not apply to sets of this size."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*The number of training batches.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # Lightning's own, about torch


def main() -> None:
    """Train, print the table, and write it with its picture."""
    arguments = parsed()
    be_quiet()
    if arguments.dataset == "digits":
        # Images of 64 pixels: several threads would wait for each other longer than they work.
        torch.set_num_threads(1)
        task = digits()
    else:
        task = cifar10(arguments.data, arguments.download)
    per_epoch = math.ceil(len(task.train) / task.batch_size)
    steps = arguments.steps or (arguments.epochs * per_epoch if arguments.epochs else task.steps)
    plan = Plan(arguments.losses, arguments.seeds, arguments.optimizer, steps, arguments.accelerator, arguments.minutes)
    published = PAPER[plan.optimizer] if arguments.dataset == "cifar10" else {}
    paper = {LOSSES[name].label: numbers for name, numbers in published.items()}
    title = (
        f"{arguments.dataset}: {steps:,} steps of {arguments.optimizer}, {task.weights} weights, "
        f"{len(task.train):,} images to train on, {len(task.test):,} to test"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = ""
    for results in compare(task, plan):
        text = f"{title}\n\n{table(results, paper)}\n"
        (arguments.out / "comparison.md").write_text(text, encoding="utf-8")
        draw(results, title, arguments.out / "comparison.png")
    print(f"\n{text}\nwritten: {arguments.out / 'comparison.md'}, {arguments.out / 'comparison.png'}")


if __name__ == "__main__":
    main()
