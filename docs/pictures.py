# ruff: noqa: T201 - a script prints
"""Draw the pictures of these pages, and print the numbers that the pages quote.

    pip install -e . --group test
    python docs/pictures.py

A small convnet learns 100 of scikit-learn's digits by heart. The others come from a worse camera, with less contrast
and out of focus: 800 of them calibrate it, 897 judge. Nothing is downloaded; it takes a minute or two.
"""

import argparse
import io
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import wandb
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib import image as mpl_image
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from lightning_clamp import CalibrationResult, Clamp, NeuralClamping, fit_clamp
from lightning_clamp.clamping import Candidate
from lightning_clamp.metrics import (
    ReliabilityCurve,
    accuracy,
    by_group,
    expected_calibration_error,
    negative_log_likelihood,
    plot_groups,
    plot_reliability,
    plot_risk_coverage,
    reliability_curve,
    risk_coverage_curve,
)

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "examples"))
from quickstart import LitDigits, digits  # noqa: E402 - the examples are scripts

SIZE = 32
GRIDS = (1, 2, 4, 8)
CAMERA = v2.Compose([v2.ColorJitter(contrast=(0.4, 0.4)), v2.GaussianBlur(7, 1.5)])
# The colours of the reliability diagram, which stay apart for the colour-blind; for lines a darker blue and red.
BLUE, TEAL, GREY, PALE, INK = "#5b8db8", "#7cc7bd", "#6b6b6b", "#a9b4bf", "#1a1a1a"
DARK_BLUE, DARK_RED = "#2f6690", "#b5475a"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": "medium", "legend.frameon": False}


class LitBigDigits(LitDigits):
    """The quickstart's module for larger images, which logs its loss."""

    def __init__(self, width: int = 32, lr: float = 3e-3) -> None:
        super().__init__(width, lr)
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2 * width * (SIZE // 8) ** 2, 10),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, logged."""
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss


class Images(NamedTuple):
    """Images ``(N, 1, 32, 32)`` and their labels."""

    inputs: Tensor
    target: Tensor

    def loader(self, batch_size: int = 256, *, shuffle: bool = False) -> DataLoader:
        """In batches."""
        return DataLoader(TensorDataset(*self), batch_size=batch_size, shuffle=shuffle)

    def worse(self) -> "Images":
        """Taken by the worse camera."""
        return Images(CAMERA(self.inputs), self.target)


class Outcome(NamedTuple):
    """What the probabilities that a clamp gives some images are worth."""

    probs: Tensor
    nll: float
    ece: float
    accuracy: float
    curve: ReliabilityCurve


class GridStudy(NamedTuple):
    """Every grid with a temperature, each fitted whatever the others promise.

    Attributes:
        test: Images that judge.
        temperature: Temperature scaling of the same calibration set.
        grids: Candidate by side of the grid.
    """

    test: Images
    temperature: Candidate
    grids: dict[int, Candidate]

    @property
    def fitted(self) -> dict[int, Candidate]:
        """Those that promised more than they cost."""
        return {size: candidate for size, candidate in self.grids.items() if candidate.clamp is not None}

    def kept(self, model: LitBigDigits, candidate: Candidate) -> float:
        """Fall of the held-out NLL against the temperature."""
        before, after = (judged(model, chosen.clamp, self.test).nll for chosen in (self.temperature, candidate))
        return before - after


class Story(NamedTuple):
    """A trained network, its data, and everything that was fitted to them.

    Attributes:
        model: The network.
        calibration: From the worse camera.
        test: From the worse camera.
        clean: The images of ``test`` by the camera of the training.
        default: The default fit to ``calibration``, which the callback made,
        alone: temperature scaling,
        outputs: and the best output map without a perturbation.
        worse: The grids on the worse camera,
        same: and on that of the training.
        logs: Folder with what the loggers wrote.
        summary: What W&B shows of the run.
    """

    model: LitBigDigits
    calibration: Images
    test: Images
    clean: Images
    default: CalibrationResult
    alone: CalibrationResult
    outputs: CalibrationResult
    worse: GridStudy
    same: GridStudy
    logs: Path
    summary: dict[str, float]


def main() -> None:
    """Train, calibrate, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for the pictures (default: beside this file)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Sets of this size need no worker processes, whatever Lightning says.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*The number of training batches.*")
    plt.switch_backend("agg")
    with tempfile.TemporaryDirectory() as logs, plt.rc_context(STYLE):
        story = tell(Path(logs))
        print_numbers(story)
        for name, draw in PICTURES.items():
            path = arguments.out / f"{name}.png"
            draw(story).savefig(path, dpi=150)
            print(f"written: {path}")


# What there is to tell


def tell(logs: Path) -> Story:
    """Train with the callback and two loggers, then fit what the pictures compare with it."""
    seed_everything(0)
    train, clean_calibration, clean = (images_of(part) for part in digits())
    calibration, test = clean_calibration.worse(), clean.worse()
    wandb_logger = WandbLogger("digits", save_dir=logs, offline=True, settings=wandb.Settings(silent=True))
    clamping = NeuralClamping(calibration.loader())
    trainer = Trainer(
        max_epochs=100,
        accelerator="cpu",
        callbacks=[clamping],
        logger=[TensorBoardLogger(logs, name="tensorboard"), wandb_logger],
        log_every_n_steps=4,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    model = LitBigDigits()
    trainer.fit(model, train.loader(32, shuffle=True))
    summary = {key: value for key, value in dict(wandb_logger.experiment.summary).items() if "/" in key}
    wandb_logger.experiment.finish()
    return Story(
        model,
        calibration,
        test,
        clean,
        default=clamping.result,
        alone=fit_clamp(model, calibration.loader(), method="temperature"),
        outputs=fit_clamp(model, calibration.loader(), grids=()),
        worse=study(model, calibration, test),
        same=study(model, clean_calibration, clean),
        logs=logs,
        summary=summary,
    )


def images_of(part: Dataset) -> Images:
    """A split of the digits, enlarged so that a grid of coefficients is smooth on them."""
    inputs, target = (torch.stack(column) for column in zip(*part, strict=True))
    return Images(F.interpolate(inputs, size=(SIZE, SIZE), mode="bilinear"), target)


def study(model: LitBigDigits, calibration: Images, test: Images) -> GridStudy:
    """Fit every grid on its own."""
    plain = {"output_maps": ("temperature",), "uniform_share": False}
    fits = {size: fit_clamp(model, calibration.loader(), grids=(size,), **plain) for size in GRIDS}
    grids = {size: fit.candidates[-1] for size, fit in fits.items()}
    return GridStudy(test, fits[GRIDS[0]].candidates[0], grids)


@torch.no_grad()
def calibrated(model: LitBigDigits, clamp: Clamp, inputs: Tensor) -> Tensor:
    """The network's logits through a clamp."""
    return clamp.scale(model(clamp.perturb(inputs)))


def judged(model: LitBigDigits, clamp: Clamp, images: Images) -> Outcome:
    """What a clamp does on some images."""
    logits, target = calibrated(model, clamp, images.inputs).double(), images.target
    measured = [metric(logits, target) for metric in (negative_log_likelihood, expected_calibration_error, accuracy)]
    return Outcome(logits.softmax(1), *map(float, measured), reliability_curve(logits, target))


# The numbers


def print_numbers(story: Story) -> None:
    """Everything the pages quote."""
    clamps = {
        "uncalibrated": Clamp(),
        "temperature": story.alone.clamp,
        **{candidate.name: candidate.clamp for candidate in story.worse.fitted.values()},
        f"outputs only: {story.outputs.chosen.name}": story.outputs.clamp,
        f"default: {story.default.chosen.name}": story.default.clamp,
    }
    print(f"{'worse camera, held out':<28}{'NLL':>8}{'ECE':>8}{'accuracy':>10}{'T':>8}")
    for name, clamp in clamps.items():
        outcome, temperature = judged(story.model, clamp, story.test), float(clamp.temperature)
        print(f"{name:<28}{outcome.nll:>8.4f}{outcome.ece:>8.2%}{outcome.accuracy:>10.2%}{temperature:>8.3f}")
    print_study("worse camera", story.worse, story)
    print_study("camera of the training", story.same, story)
    fits = {"default": story.default, "outputs only": story.outputs, "temperature": story.alone}
    for name, fit in fits.items():
        print(f"\n{name}: {fit.passes} passes, {fit.seconds:.1f} s; {fit.reason}")
    print_temperatures(story)


def print_study(name: str, grids: GridStudy, story: Story) -> None:
    """What each grid promised, cost and brought, in nats."""
    columns = ("p", "statistic", "p-value", "promised", "p/n", "reached", "error", "expected", "held out", "passes")
    print(f"\n{name:<24}" + "".join(f"{column:>10}" for column in columns))
    for size, candidate in grids.grids.items():
        p = candidate.n_parameters - 1
        cells = [p, f"{candidate.lm_statistic:.1f}", f"{candidate.p_value:.1e}", f"{candidate.predicted_gain:.4f}"]
        cells.append(f"{p / story.default.n_samples:.4f}")
        if candidate.clamp is None:
            cells.append(f"  {candidate.refusal.words}")
        else:
            kept = grids.kept(story.model, candidate)
            cells += [f"{candidate.achieved_gain:.4f}", f"{candidate.standard_error:.4f}"]
            cells += [f"{-candidate.expected_change:.4f}", f"{kept:.4f}", candidate.passes]
        print(f"{f'{size}×{size} grid':<24}" + "".join(f"{cell:>10}" for cell in cells))


def print_temperatures(story: Story) -> None:
    """Where NLL and ECE of the calibration set have their minimum."""
    temperatures, _, ece = over_temperatures(story)
    best = float(story.alone.clamp.temperature)
    at_best, lowest = judged(story.model, story.alone.clamp, story.calibration), min(ece)
    print(f"\ncalibration set, T = 1: NLL {story.alone.before['nll']:.4f}, ECE {story.alone.before['ece']:.2%}")
    print(f"T = {best:.3f}: NLL {at_best.nll:.4f}, ECE {at_best.ece:.2%}")
    print(f"the ECE is lowest, {lowest:.2%}, at T = {temperatures[ece.index(lowest)]:.2f}\n")


def over_temperatures(story: Story) -> tuple[list[float], list[float], list[float]]:
    """Temperatures, and NLL and ECE of the calibration set at each."""
    temperatures = torch.linspace(0.5, 4, 176).tolist()
    logits = calibrated(story.model, Clamp(), story.calibration.inputs).double()
    scaled = [logits / temperature for temperature in temperatures]
    nll = [float(negative_log_likelihood(one, story.calibration.target)) for one in scaled]
    ece = [float(expected_calibration_error(one, story.calibration.target)) for one in scaled]
    return temperatures, nll, ece


# The pictures


def draw_perturbations(story: Story) -> Figure:
    """The perturbation of every grid, and what it does to one image."""
    grids, index = story.worse.fitted, example(story)
    image, label = story.test.inputs[index], int(story.test.target[index])
    figure, panels = plt.subplots(2, 1 + len(grids), figsize=(9, 4.2), layout="constrained")
    show_image(panels[0, 0], story.clean.inputs[index], f"a {label}, as in training")
    show_image(panels[1, 0], image, "worse camera: x", prediction(story.model, Clamp(), image))
    limit = max(float(candidate.clamp.perturbation.abs().max()) for candidate in grids.values())
    for column, (size, candidate) in enumerate(grids.items(), start=1):
        drawn = panels[0, column].imshow(candidate.clamp.perturbation[0], cmap="RdBu_r", vmin=-limit, vmax=limit)
        panels[0, column].set(title=f"δ of the {size}×{size} grid", xticks=[], yticks=[])
        moved = candidate.clamp.perturb(image[None])[0]
        show_image(panels[1, column], moved, "x + δ", prediction(story.model, candidate.clamp, image))
    figure.colorbar(drawn, ax=panels[0], shrink=0.9, label="added to the input", pad=0.01)
    for panel in panels.flat:
        panel.spines[:].set_visible(False)
    return figure


def example(story: Story) -> int:
    """The first 6 that the bare network takes for another digit, and the default does not."""
    target = story.test.target
    bare, default = (judged(story.model, clamp, story.test).probs for clamp in (Clamp(), story.default.clamp))
    wanted = (target == 6) & (bare.argmax(1) != target) & (default.argmax(1) == target)
    return int(wanted.int().argmax())


def show_image(panel: Axes, image: Tensor, title: str, below: str = "") -> None:
    """One grey image; what is outside [0, 1] is cut off for the eye, not for the network."""
    panel.imshow(image[0], cmap="gray", vmin=0, vmax=1)
    panel.set(title=title, xlabel=below, xticks=[], yticks=[])


def prediction(model: LitBigDigits, clamp: Clamp, image: Tensor) -> str:
    """The predicted class and its probability."""
    probability, label = calibrated(model, clamp, image[None])[0].softmax(0).max(0)
    return f"taken for a {int(label)}, {float(probability):.0%}"


def draw_score_test(story: Story) -> Figure:
    """What the first pass promised, what the fit reached, and what is left of it on new images."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
    titles = ("calibrated on the worse camera", "calibrated on the camera of the training")
    for ax, title, grids in zip(axes, titles, (story.worse, story.same), strict=True):
        draw_study(ax, grids, story)
        ax.set_title(title)
    axes[0].set_ylabel("fall of the NLL against T alone, nats")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", columnspacing=1.4)
    return figure


def draw_study(ax: Axes, grids: GridStudy, story: Story) -> None:
    """Three bars for every grid, and what it is charged."""
    candidates = list(grids.grids.values())
    bars = {
        "promised by the first pass": (PALE, [candidate.predicted_gain for candidate in candidates]),
        "reached, calibration set": (BLUE, [candidate.achieved_gain or 0.0 for candidate in candidates]),
        "kept, held-out images": (
            TEAL,
            [0.0 if candidate.clamp is None else grids.kept(story.model, candidate) for candidate in candidates],
        ),
    }
    for place, (name, (colour, heights)) in enumerate(bars.items()):
        ax.bar([k + 0.27 * (place - 1) for k in range(len(candidates))], heights, 0.25, color=colour, label=name)
    for k, candidate in enumerate(candidates):
        if candidate.clamp is None:
            ax.text(k, 0, "not fitted\n", color=GREY, fontsize="small", ha="center", va="bottom")
            continue
        cost = (candidate.n_parameters - 1) / story.default.n_samples + candidate.standard_error
        ax.hlines(cost, k - 0.44, k + 0.44, color=DARK_RED, linewidth=1.6, label=None if k else "what it is charged")
    ax.axhline(0, color=INK, linewidth=0.8)
    names = [f"{size}×{size}\np = {candidate.p_value:.0e}" for size, candidate in grids.grids.items()]
    ax.set_xticks(range(len(candidates)), names)


def draw_temperature(story: Story) -> Figure:
    """NLL and ECE over T, and the confidences before and after."""
    temperatures, nll, ece = over_temperatures(story)
    best = float(story.alone.clamp.temperature)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    twin = left.twinx()
    twin.spines["right"].set_visible(True)
    for ax, values, colour, style in ((left, nll, DARK_BLUE, "-"), (twin, ece, DARK_RED, "--")):
        ax.plot(temperatures, values, color=colour, linestyle=style)
        ax.set_ylim(0, None)
        ax.tick_params(axis="y", colors=colour)
    left.set_ylabel("NLL, nats (solid)", color=DARK_BLUE)
    twin.set_ylabel("ECE (dashed)", color=DARK_RED)
    twin.yaxis.set_major_formatter("{x:.0%}")
    for temperature, name, colour in ((1.0, "as trained", GREY), (best, f"chosen: T = {best:.2f}", INK)):
        left.axvline(temperature, color=colour, linewidth=1)
        left.text(temperature + 0.05, 0.03, name, color=colour, transform=left.get_xaxis_transform())
    left.set(xlabel="temperature", title="calibration set", xlim=(0.5, 4))
    draw_confidences(right, story, best)
    return figure


def draw_confidences(ax: Axes, story: Story, temperature: float) -> None:
    """Histograms of the largest probability."""
    bins = {"bins": 20, "range": (0, 1)}
    before, after = (
        judged(story.model, clamp, story.calibration).probs.amax(1) for clamp in (Clamp(), story.alone.clamp)
    )
    weights = torch.full_like(before, 1 / len(before))
    ax.hist(before, **bins, weights=weights, color=PALE, label="as trained")
    name = f"T = {temperature:.2f}"
    ax.hist(after, **bins, weights=weights, color=DARK_BLUE, label=name, histtype="step", linewidth=1.8)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set(xlabel="confidence", ylabel="share of the images", title="how sure it is", xlim=(0, 1))
    ax.legend(loc="upper left")


def draw_before_and_after(story: Story) -> Figure:
    """Reliability diagrams of held-out images: nothing, temperature, default."""
    figure, panels = plt.subplots(1, 3, figsize=(9, 4.2), layout="constrained")
    clamps = {
        "uncalibrated": Clamp(),
        "temperature alone": story.alone.clamp,
        f"default: {story.default.chosen.name}": story.default.clamp,
    }
    for ax, (name, clamp) in zip(panels, clamps.items(), strict=True):
        outcome = judged(story.model, clamp, story.test)
        title = f"{name}\nNLL {outcome.nll:.3f}, accuracy {outcome.accuracy:.1%}"
        plot_reliability(outcome.curve, ax=ax, title=title)
    for ax in panels[1:]:
        ax.set_ylabel("")
    return figure


def draw_risk_coverage(story: Story) -> Figure:
    """Error rate over coverage of held-out images, uncalibrated and with the default clamp."""
    before, after = (
        risk_coverage_curve(judged(story.model, clamp, story.test).probs, story.test.target, probs=True)
        for clamp in (Clamp(), story.default.clamp)
    )
    for share in (0.5, 0.8):
        print(f"accuracy at coverage {share}: {before.accuracy_at(share):.1%}, {after.accuracy_at(share):.1%}")
    return plot_risk_coverage({"before": before, "after": after})[0]


def draw_groups(story: Story) -> Figure:
    """NLL of every digit of held-out images, uncalibrated and with the default clamp."""
    before, after = (
        by_group(
            partial(negative_log_likelihood, probs=True),
            judged(story.model, clamp, story.test).probs,
            story.test.target,
            groups=story.test.target,
            n_groups=10,
            min_samples=50,
        )
        for clamp in (Clamp(), story.default.clamp)
    )
    names = [f"digit {digit}" for digit in range(10)]
    return plot_groups(after.values, after.sizes, before=before.values, names=names, label="NLL")[0]


def draw_tensorboard(story: Story) -> Figure:
    """Scalars and images that are in TensorBoard's file."""
    (file,) = (story.logs / "tensorboard").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    scalars = {tag: events.Scalars(tag)[-1] for tag in sorted(events.Tags()["scalars"]) if "/" in tag}
    rows = [(tag, f"{event.value:.4g}", str(event.step)) for tag, event in scalars.items()]
    images = {
        tag: mpl_image.imread(io.BytesIO(events.Images(tag)[-1].encoded_image_string), format="png")
        for tag in sorted(events.Tags()["images"])
    }
    return draw_log("as logged to TensorBoard", ("scalar", "last value", "step"), rows, images)


def draw_wandb(story: Story) -> Figure:
    """The summary of the W&B run, and the images in its media folder."""
    rows = [(key, f"{value:.4g}") for key, value in sorted(story.summary.items()) if isinstance(value, int | float)]
    images = {
        # Their names end in a step and a hash.
        f"calibration/{path.stem.rsplit('_', 2)[0]}": mpl_image.imread(path)
        for path in sorted((story.logs / "wandb").rglob("media/images/calibration/*.png"))
    }
    return draw_log("as logged to Weights & Biases", ("summary", "value"), rows, images)


def draw_log(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], images: Mapping[str, NDArray]) -> Figure:
    """A table and pictures side by side: what was logged, not what the logger's page looks like."""
    figure = plt.figure(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    left, right = figure.subfigures(1, 2, width_ratios=[4, 5])
    ax = left.subplots()
    ax.set_axis_off()
    table = ax.table(rows, colLabels=header, loc="center", cellLoc="right", colLoc="right", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.auto_set_column_width(range(len(header)))
    table.scale(1, 1.4)
    for (_, column), cell in table.get_celld().items():
        cell.set_edgecolor(PALE)
        if column == 0:
            cell.set_text_props(ha="left")
    # On one scale.
    widths = [image.shape[1] for image in images.values()]
    panels = right.subplots(1, len(images), width_ratios=widths, squeeze=False)[0]
    for panel, (name, image) in zip(panels, images.items(), strict=True):
        panel.imshow(image, interpolation="lanczos")
        panel.set_title(name, fontsize="small")
        panel.set_axis_off()
    return figure


PICTURES = {
    "perturbations": draw_perturbations,
    "score-test": draw_score_test,
    "temperature": draw_temperature,
    "before-after": draw_before_and_after,
    "risk-coverage": draw_risk_coverage,
    "groups": draw_groups,
    "tensorboard": draw_tensorboard,
    "wandb": draw_wandb,
}

if __name__ == "__main__":
    main()
