"""Held-out quality: every method on every network and data set, with intervals against temperature scaling."""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from cases import SEVERITIES, Problem, load
from methods import (
    AUGMENTED,
    LIGHT,
    NOTHING,
    PERTURBATION,
    PUBLISHED,
    Cell,
    Method,
    Outcome,
    forward,
    of_peers,
    paired,
)
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metric = Callable[..., Tensor]
METRICS: dict[str, Metric] = {
    "ECE": metrics.expected_calibration_error,
    "adaptive": metrics.adaptive_calibration_error,
    "classwise": metrics.classwise_calibration_error,
    "smooth": metrics.smooth_calibration_error,
    "Brier": metrics.brier_score,
    "accuracy": metrics.accuracy,
}
_RESAMPLES = 40


class Plan(NamedTuple):
    """What to run.

    Attributes:
        cases: Names of networks and data, see :func:`cases.load`.
        published: Those in which the published method is run,
        augmented: and those in which it is run with its augmentation too.
        sizes: Calibration sizes; dense cases have the largest only.
        heavy: The size for the published method and for all metrics, in the first direction.
        held: Most held-out samples.
        directions: How many of the two.
    """

    cases: Sequence[str]
    published: Sequence[str]
    augmented: Sequence[str]
    sizes: Sequence[int]
    heavy: int
    held: int = 5000
    directions: int = 2


def _shifts(network: str, kinds: Iterable[str]) -> list[str]:
    return [f"{network} {kind} {severity}" for kind in kinds for severity in SEVERITIES[kind]]


SMALL = Plan(
    cases=("cifar10-resnet20", "cifar10-resnet20 jpeg 40", "cifar100-densenet"),
    published=("cifar10-resnet20 jpeg 40",),
    augmented=("cifar10-resnet20 jpeg 40",),
    sizes=(250, 1000),
    heavy=250,
    held=2000,
    directions=1,
)
FULL = Plan(
    cases=(
        "cifar10-resnet20",
        *_shifts("cifar10-resnet20", SEVERITIES),
        "cifar100-resnet32",
        "cifar100-resnet32 jpeg 60",
        "cifar100-resnet32 noise 0.03",
        "cifar100-resnet32 blur 0.5",
        "cifar100-resnet32 contrast 0.5",
        "cifar100-densenet",
        "nuclei-unet",
        "cifar10-resnet110",
        "cifar10-resnet110 jpeg 40",
    ),
    published=(
        "cifar10-resnet20",
        "cifar10-resnet20 jpeg 40",
        "cifar10-resnet20 noise 0.03",
        "cifar10-resnet20 blur 0.5",
        "cifar10-resnet20 contrast 0.5",
        "cifar100-resnet32",
        "cifar100-resnet32 jpeg 60",
    ),
    augmented=("cifar10-resnet20", "cifar10-resnet20 jpeg 40", "cifar100-resnet32"),
    sizes=(250, 500, 1000, 2500, 5000),
    heavy=500,
)
SMOKE = SMALL._replace(cases=("cifar100-densenet",), sizes=(250,), held=500)


class Row(NamedTuple):
    """One method in one cell.

    ``change`` is the held-out NLL less that of temperature scaling, in nats, ``error`` its paired standard error over
    the samples; ``against_vector`` and ``vector_error`` the same against vector scaling. ``chosen``, ``expected`` and
    ``expected_error`` are this package's choice, and the change it expected. ``values`` and ``errors`` are the other
    metrics, and the paired bootstrap standard errors of their differences from temperature scaling.
    """

    case: str
    size: int
    direction: int
    method: str
    nll: float
    change: float
    error: float
    against_vector: float
    vector_error: float
    seconds: float
    passes: int
    chosen: str
    expected: float
    expected_error: float
    values: dict[str, float]
    errors: dict[str, float]

    @property
    def is_better(self) -> bool:
        """Than temperature scaling, by more than two standard errors."""
        return self.change < -2 * self.error - NOTHING

    @property
    def is_worse(self) -> bool:
        """Than temperature scaling, by more than two standard errors."""
        return self.change > 2 * self.error + NOTHING

    @property
    def is_worse_than_vector(self) -> bool:
        """Than vector scaling, by more than two standard errors."""
        return self.against_vector > 2 * self.vector_error + NOTHING


def run(plan: Plan, folder: Path, device: str) -> Iterator[Row]:
    """Every method in every cell, as they are done; the networks run on the device."""
    peers = of_peers()
    for case in plan.cases:
        problem = load(case, folder, device)
        outputs = forward(problem)
        order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(0))
        sizes = plan.sizes if problem.task == "multiclass" else plan.sizes[-1:]
        for direction, (pool, held) in enumerate((order.chunk(2), order.chunk(2)[::-1])[: plan.directions], start=1):
            held = held[: plan.held]
            for size in sorted({min(size, len(pool)) for size in sizes}):
                part = pool[:size]
                cell = Cell(case, size, direction, problem.part(part), problem.part(held), outputs[part], outputs[held])
                methods = LIGHT | peers
                detailed = direction == 1 and size == min(plan.heavy, len(pool))
                if detailed or (direction == 1 and size == sizes[-1] and case in plan.published):
                    methods |= PERTURBATION
                if detailed:
                    methods |= PUBLISHED if case in plan.published else {}
                    methods |= AUGMENTED if case in plan.augmented else {}
                yield from _cell(cell, methods, detailed=detailed)


def _cell(cell: Cell, methods: dict[str, Method], *, detailed: bool) -> Iterator[Row]:
    """The methods in one cell, temperature scaling first; with all metrics if asked."""
    losses: dict[str, Tensor] = {}
    draws: dict[str, Tensor] = {}
    for method, fit in methods.items():
        outcome = fit(cell)
        if outcome is None:
            continue
        loss = losses[method] = _losses(outcome.logits, cell.held)
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        if detailed:
            rows = _probabilities(outcome.logits, cell.held)
            values = dict(zip(METRICS, _values(*rows), strict=True))
        if detailed and cell.held.task == "multiclass":
            draws[method] = _draws(*rows)
            errors = dict(zip(METRICS, (draws[method] - draws["temperature"]).std(0).tolist(), strict=True))
        yield _row(cell, method, outcome, loss, losses, values, errors)


def _row(
    cell: Cell,
    method: str,
    outcome: Outcome,
    loss: Tensor,
    losses: dict[str, Tensor],
    values: dict[str, float],
    errors: dict[str, float],
) -> Row:
    result = outcome.result
    chosen = None if result is None else result.chosen
    return Row(
        cell.case,
        cell.size,
        cell.direction,
        method,
        float(loss.mean()),
        *paired(loss, losses["temperature"]),
        *paired(loss, losses.get("vector scaling", torch.full_like(loss, math.nan))),
        outcome.seconds,
        0 if result is None else result.passes,
        "" if chosen is None else chosen.name,
        math.nan if chosen is None or chosen.expected_change is None else chosen.expected_change,
        math.nan if chosen is None or chosen.standard_error is None else chosen.standard_error,
        values,
        errors,
    )


def _losses(logits: Tensor, held: Problem) -> Tensor:
    """Loss of every sample, that of an image being the mean over its pixels."""
    logits, target = _classes(logits, held)
    return F.cross_entropy(logits, target, reduction="none").reshape(len(target), -1).mean(1)


def _classes(logits: Tensor, held: Problem) -> tuple[Tensor, Tensor]:
    """Logits of classes, float64: those of a one-logit head are 0 and the logit."""
    if held.task == "binary":
        one = logits.double().reshape(held.target.shape)
        return torch.stack([torch.zeros_like(one), one], 1), held.target
    return logits.double(), held.target


def _probabilities(logits: Tensor, held: Problem) -> tuple[Tensor, Tensor]:
    """Rows of probabilities and their labels, a row for every pixel."""
    logits, target = _classes(logits, held)
    return logits.softmax(1).movedim(1, -1).flatten(0, -2), target.flatten()


def _values(probs: Tensor, target: Tensor) -> list[float]:
    return [float(metric(probs, target, probs=True)) for metric in METRICS.values()]


def _draws(probs: Tensor, target: Tensor) -> Tensor:
    """The metrics of resampled rows, the same rows for every method, ``(resamples, metrics)``."""
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(_RESAMPLES):
        index = torch.randint(len(target), (len(target),), generator=generator)
        draws.append(_values(probs[index], target[index]))
    return torch.tensor(draws, dtype=torch.float64)


_PLAIN = Row._fields[:-2]


def save(rows: Sequence[Row], path: Path) -> None:
    """All rows as CSV, from which :func:`saved` makes them again."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_PLAIN, *METRICS, *(f"{name} error" for name in METRICS)])
        for row in rows:
            figures = [part.get(name, "") for part in (row.values, row.errors) for name in METRICS]
            writer.writerow([*row[:-2], *figures])


def saved(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            plain = [Row.__annotations__[name](line[name]) for name in _PLAIN]
            values = {name: float(line[name]) for name in METRICS if line[name]}
            errors = {name: float(line[f"{name} error"]) for name in METRICS if line[f"{name} error"]}
            rows.append(Row(*plain, values, errors))
    return rows


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as Markdown: in short, by size, what the criterion foretold, what was chosen, all metrics by case."""
    yield from _summary([row for row in rows if row.values])
    yield from _by_method(rows)
    yield from _predictions(rows)
    yield from _choices(rows)
    for case in dict.fromkeys(row.case for row in rows):
        if own := [row for row in rows if row.case == case and row.values]:
            yield from _by_case(case, own)


_IN_SHORT = (
    "uncalibrated",
    "temperature",
    "vector scaling",
    "probmetrics SVS",
    "published",
    "perturbation and T",
    "default",
)


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    sizes = " or ".join(str(size) for size in sorted({row.size for row in rows}))
    yield f"\n### In short: {sizes} samples to calibrate, held-out NLL (change, units of .001 ± standard error), ECE\n"
    methods = [method for method in _IN_SHORT if any(row.method == method for row in rows)]
    yield f"| network and data | {' | '.join(methods)} |"
    yield "|" + "---|" * (len(methods) + 1)
    for case in dict.fromkeys(row.case for row in rows):
        cells = []
        for method in methods:
            own = [row for row in rows if (row.case, row.method) == (case, method)]
            cells.append(_in_short(own[0]) if own else "")
        yield f"| {case} | {' | '.join(cells)} |"


def _in_short(row: Row) -> str:
    change = (
        "" if row.method in ("uncalibrated", "temperature") else f" ({1000 * row.change:+.1f} ± {1000 * row.error:.1f})"
    )
    return f"{row.chosen + ': ' if row.chosen else ''}{row.nll:.4f}{change}, {row.values['ECE']:.1%}"


def _by_case(case: str, rows: Sequence[Row]) -> Iterator[str]:
    yield f"\n### {case}, {rows[0].size} samples to calibrate\n"
    yield f"| method | NLL (change) | {' | '.join(METRICS)} | seconds |"
    yield "|" + "---|" * (len(METRICS) + 3)
    base = rows[0]
    for row in rows:
        cells = [f"{row.nll:.4f} ({1000 * row.change:+.1f} ± {1000 * row.error:.1f})"]
        for name in METRICS:
            cell = f"{row.values[name]:.2%}"
            if row.errors and row is not base:
                cell += f" ({100 * (row.values[name] - base.values[name]):+.2f} ± {100 * row.errors[name]:.2f})"
            cells.append(cell)
        yield f"| {row.method} | {' | '.join(cells)} | {row.seconds:.1f} |"


def _by_method(rows: Sequence[Row]) -> Iterator[str]:
    sizes = sorted({row.size for row in rows})
    yield "\n### All cells: mean change of the held-out NLL against temperature scaling, in units of .001, by size"
    yield "Better, worse: cells beyond two paired standard errors. A method's means are over the cells it was run in.\n"
    yield f"| method | {' | '.join(map(str, sizes))} | better than temperature | worse | worse than vector scaling |"
    yield "|" + "---|" * (len(sizes) + 4)
    for method in dict.fromkeys(row.method for row in rows if row.method != "temperature"):
        own = [row for row in rows if row.method == method]
        cells = []
        for size in sizes:
            here = [1000 * row.change for row in own if row.size == size]
            mean = sum(here) / len(here) if here else math.nan
            cells.append("" if not here else f"{mean:+.1f}" if abs(mean) < 1e6 else f"{mean:+.0e}")
        better, worse = sum(row.is_better for row in own), sum(row.is_worse for row in own)
        compared = [row for row in own if not math.isnan(row.against_vector)]
        lost = sum(row.is_worse_than_vector for row in compared)
        cells += [f"{better} of {len(own)}", str(worse), f"{lost} of {len(compared)}"]
        yield f"| {method} | {' | '.join(cells)} |"
    yield "\nCells in which the default is worse than temperature or vector scaling by more than two standard errors:\n"
    yield "| network and data | size, direction | chosen | against temperature | against vector scaling |"
    yield "|---|---|---|---|---|"
    for row in rows:
        if row.method == "default" and (row.is_worse or row.is_worse_than_vector):
            yield (
                f"| {row.case} | {row.size}, {row.direction} | {row.chosen} "
                f"| {1000 * row.change:+.1f} ± {1000 * row.error:.1f} "
                f"| {1000 * row.against_vector:+.1f} ± {1000 * row.vector_error:.1f} |"
            )


def _predictions(rows: Sequence[Row]) -> Iterator[str]:
    """How well the expected change foretold the held-out one, where the default chose more than the temperature."""
    own = [row for row in rows if row.method == "default" and row.chosen not in ("", "temperature")]
    pairs = [(row.expected, row.expected_error, row) for row in own]
    if not pairs:
        return
    right = sum(row.change < 0 for _, _, row in pairs)
    clear = [row for _, _, row in pairs if row.is_better or row.is_worse]
    scores = [(row.change - expected) / math.hypot(error, row.error) for expected, error, row in pairs if row.error]
    slope = sum(e * row.change for e, _, row in pairs) / sum(e * e for e, _, row in pairs)
    yield "\n### What was expected and what came, where the default chose more than the temperature\n"
    yield f"Right sign: {right} of {len(pairs)}; of the {len(clear)} whose change is beyond two standard errors,"
    yield f"{sum(row.is_better for row in clear)}. Slope of the held-out change on the expected one: {slope:.2f}."
    yield f"(Held out - expected) / standard error: mean {sum(scores) / len(scores):+.2f}, root mean square"
    yield f"{math.sqrt(sum(s * s for s in scores) / len(scores)):.2f}, beyond 2 in {sum(abs(s) > 2 for s in scores)}."


def _choices(rows: Sequence[Row]) -> Iterator[str]:
    yield "\n### What the default chose, and what it brought held out (units of .001)\n"
    yield "| chosen | cells without a shift | change | cells with a shift | change |"
    yield "|---|---|---|---|---|"
    own = [row for row in rows if row.method == "default"]
    for name in sorted({row.chosen for row in own}):
        cells = []
        for shifted in (False, True):
            here = [1000 * row.change for row in own if row.chosen == name and (" " in row.case) == shifted]
            cells += [str(len(here)), f"{sum(here) / len(here):+.1f}" if here else ""]
        yield f"| {name} | {' | '.join(cells)} |"
    shifted = [row for row in own if " " in row.case]
    clear = sum(row.is_better for row in shifted)
    yield f"\nWith a shift it is better than temperature scaling by more than two standard errors in {clear} of"
    yield f"{len(shifted)} cells."


def draw(rows: Sequence[Row], path: Path) -> None:
    """Held-out change against calibration size, one panel per case, one line per method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(row.case for row in rows))
    # Other methods of the temperature would all lie on the dotted line, or above it.
    hidden = ("uncalibrated", "temperature", "bisection", "LBFGS")
    methods = dict.fromkeys(row.method for row in rows)
    shown = [method for method in methods if not any(word in method for word in hidden)]
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    size = (3.4 * columns, 2.6 * lines + 0.8)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for ax, case in zip(axes.flat, cases, strict=False):
        draw_case(ax, [row for row in rows if row.case == case and row.method in shown], shown)
        ax.set_title(case, fontsize=9)
    for ax in axes.flat[len(cases) :]:
        ax.set_axis_off()
    words = "samples to calibrate; below 0 is better than temperature scaling, and an arrow is beyond the panel"
    figure.supxlabel(words, fontsize=9)
    figure.supylabel("change of the held-out NLL, × .001", fontsize=9)
    handles = {name: handle for ax in axes.flat for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_case(ax: "Axes", rows: Sequence[Row], shown: Sequence[str]) -> None:
    """The mean change of every method by size; what is beyond the panel is an arrow at its edge."""
    curves = {method: _mean_changes([row for row in rows if row.method == method]) for method in shown}
    low, high = limits([mean for curve in curves.values() for mean in curve.values()])
    for index, (method, curve) in enumerate(curves.items()):
        if not curve:
            continue
        bold = {"linewidth": 2.2, "zorder": 5} if method == "default" else {"linewidth": 1.0}
        ax.plot(curve.keys(), curve.values(), "o-", markersize=3, color=f"C{index % 10}", label=method, **bold)
        beyond = [size for size, mean in curve.items() if mean > high]
        if beyond:
            ax.plot(beyond, [high] * len(beyond), "^", markersize=5, color=f"C{index % 10}", clip_on=False)
    ax.axhline(0, color="black", linewidth=0.8, linestyle=":")
    ax.set(xscale="log", ylim=(low, high))
    sizes = sorted({row.size for row in rows})
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.tick_params(labelsize=7)


def limits(changes: Sequence[float]) -> tuple[float, float]:
    """Of a panel: all that is better than temperature scaling, and as much of what is worse, five at least."""
    low, high = min([0.0, *changes]), max([0.0, *changes])
    high = min(high, max(-low, 5.0))
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _mean_changes(rows: Sequence[Row]) -> dict[int, float]:
    """Mean change, × .001, by size."""
    return {
        size: 1000 * statistics.fmean(row.change for row in rows if row.size == size)
        for size in sorted({row.size for row in rows})
    }
