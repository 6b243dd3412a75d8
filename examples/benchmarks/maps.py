"""Output maps on saved logits, without any network: what they bring held out, what they promised, what they cost."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import peers
import torch
from methods import NOTHING, paired, unshrunk_vector
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_clamp import CalibrationResult, fit_clamp

# Logits (N, C), float64, and labels (N,).
Half: TypeAlias = tuple[Tensor, Tensor]
# From logits and labels to a function that maps logits, and what this package says of its fit; None where it has none.
Fit: TypeAlias = Callable[[Tensor, Tensor], tuple[Callable[[Tensor], Tensor], CalibrationResult | None] | None]

_SHIFTS = ("shifted", "rotated", "pixelated", "noise", "jpeg")
_MOST = 5000
_DEFAULT, _TEMPERATURE, _SVS, _SMS = "default", "temperature", "probmetrics SVS", "probmetrics SMS"


class Plan(NamedTuple):
    """What to run.

    Attributes:
        draws: How many calibration sets of every size, in each direction; the size None is the whole half.
        timed: Numbers of rows and classes of the logits that fits are timed on.
    """

    draws: dict[int | None, int]
    timed: Sequence[tuple[int, int]]


SMALL = Plan({250: 1, 1000: 1, None: 1}, ((5000, 10), (5000, 100), (5000, 1000)))
FULL = Plan({250: 3, 1000: 2, None: 1}, (*SMALL.timed, (25_000, 1000)))
SMOKE = Plan({250: 1}, ((500, 10),))


class Judged(NamedTuple):
    """One calibration set, and every method on it.

    Attributes:
        case: Name of the data.
        size: Samples to calibrate with, or "half".
        direction: Which half is calibrated on, 0 or 1.
        losses: Held-out losses of every method, of the same samples.
        chosen: What the default chose,
        promised: the change of the held-out NLL that it expected,
        promised_error: and the standard error of that.
    """

    case: str
    size: str
    direction: int
    losses: dict[str, Tensor]
    chosen: str
    promised: float
    promised_error: float

    @property
    def shifted(self) -> bool:
        """Whether the data are not those that the network was trained for."""
        return any(word in self.case for word in _SHIFTS)

    def change(self, method: str, reference: str = _TEMPERATURE) -> tuple[float, float]:
        """Mean difference of the held-out losses, and its standard error."""
        return paired(self.losses[method], self.losses[reference])


def report(folder: Path, plan: Plan) -> Iterator[str]:
    """The tables, in Markdown.

    Args:
        folder: Has ``hard/*.npz`` and the CIFAR logits; those that are missing are left out.
        plan: What to run.
    """
    yield "## Output maps\n"
    cases = dict(_cases(folder))
    if cases:
        methods = _methods()
        judged = [_judged(*cell, methods) for case, halves in cases.items() for cell in _cells(case, halves, plan)]
        yield from _tables(judged, list(methods))
    else:
        yield "The folder has no saved logits (hard/*.npz, cifar10-densenet40-logits.npz, ...): no maps are judged.\n"
    yield _times(plan)


# The data


def _cases(folder: Path) -> Iterator[tuple[str, tuple[Half, Half]]]:
    """Every case and its two halves: what was meant for calibration, and the rest."""
    for path in sorted((folder / "hard").glob("*.npz")):
        with np.load(path) as data:
            logits, target = data["z"], data["y"]
            if "n_calibration" in data:
                yield path.stem, _cut(logits, target, int(data["n_calibration"]))
            else:
                yield path.stem, _shuffled(logits, target)
    with suppress(FileNotFoundError), np.load(folder / "cifar10-densenet40-logits.npz") as data:
        halves = _half(data["calibration"], data["y_calibration"]), _half(data["test"], data["y_test"])
        yield "cifar10-densenet40", halves
    with suppress(FileNotFoundError), np.load(folder / "cifar100-resnet110-logits.npz") as data:
        for version in ("clean", "jpeg40", "noise.03"):
            halves = _half(data[f"{version}_calibration"], data["yc"]), _half(data[f"{version}_test"], data["yt"])
            yield f"cifar100-resnet110 {version}", halves
    with suppress(FileNotFoundError), np.load(folder / "cifar100-test-logprobs.npz") as data:
        yield "cifar100-densenet", _shuffled(data["densenet_bc_100"], data["y"])


def _half(logits: np.ndarray, target: np.ndarray) -> Half:
    return torch.from_numpy(logits.astype(np.float64)), torch.from_numpy(target.astype(np.int64))


def _cut(logits: np.ndarray, target: np.ndarray, at: int) -> tuple[Half, Half]:
    return _half(logits[:at], target[:at]), _half(logits[at:], target[at:])


def _shuffled(logits: np.ndarray, target: np.ndarray) -> tuple[Half, Half]:
    order = np.random.default_rng(0).permutation(len(target))
    return _cut(logits[order], target[order], len(target) // 2)


def _cells(case: str, halves: tuple[Half, Half], plan: Plan) -> Iterator[tuple[str, str, int, Half, Half]]:
    """Case, size, direction, calibration set and what judges it."""
    for direction, ((logits, target), held) in enumerate((halves, halves[::-1])):
        for size, draws in plan.draws.items():
            for draw in range(draws):
                whole = slice(min(len(target), _MOST))
                order = np.random.default_rng(100 * draw + direction).permutation(len(target))
                part = whole if size is None else torch.from_numpy(order[:size])
                name = "half" if size is None else f"{size:,}"
                yield case, name, direction, (logits[part], target[part]), held


# The methods


def _clamp(logits: Tensor, target: Tensor, **options: Any) -> tuple[Callable[[Tensor], Tensor], CalibrationResult]:
    """This package's fit of the outputs; without a word on those that it leaves as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit_clamp(nn.Identity(), [(logits, target)], **options)
    return result.clamp.scale, result


def _vector(logits: Tensor, target: Tensor) -> tuple[Callable[[Tensor], Tensor], None] | None:
    fit = unshrunk_vector(logits, target)
    return None if fit is None else (lambda other: fit.space.apply(other, fit.free), None)


def _peer(logits: Tensor, target: Tensor, *, fit: peers.Fit) -> tuple[Callable[[Tensor], Tensor], None]:
    calibrate = fit(logits.float(), target)
    return lambda other: calibrate(other.float()), None


def _methods() -> dict[str, Fit]:
    """The temperature and this package's ways first, then the peers that are installed here and fit more than that."""
    own: dict[str, Fit] = {
        _TEMPERATURE: partial(_clamp, method="temperature"),
        _DEFAULT: partial(_clamp, grids=()),
        "default without the matrix": partial(_clamp, grids=(), output_maps=("vector",)),
        "vector scaling, not shrunk": _vector,
    }
    return own | {name: partial(_peer, fit=fit) for name, fit in _peers().items()}


def _peers() -> dict[str, peers.Fit]:
    wanted = (_SVS, _SMS, "torch-uncertainty vector")
    return {name: fit for name, fit in peers.installed().items() if name in wanted}


def _judged(case: str, size: str, direction: int, calibration: Half, held: Half, methods: dict[str, Fit]) -> Judged:
    logits, target = held
    losses: dict[str, Tensor] = {}
    chosen = None
    for name, fit in methods.items():
        if (fitted := fit(*calibration)) is None:
            continue
        calibrate, result = fitted
        losses[name] = F.cross_entropy(calibrate(logits).double(), target, reduction="none")
        if name == _DEFAULT:
            assert result is not None
            chosen = result.chosen
    if chosen is None:
        return Judged(case, size, direction, losses, "nothing", 0.0, 0.0)
    return Judged(
        case, size, direction, losses, chosen.name, chosen.expected_change or 0.0, chosen.standard_error or 0.0
    )


# The tables


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def _tables(judged: Sequence[Judged], methods: Sequence[str]) -> Iterator[str]:
    cases = dict.fromkeys(cell.case for cell in judged)
    yield (
        f"{len(judged)} calibration sets of {len(cases)} networks and data, in both directions. Changes are those of\n"
        "the held-out NLL in units of .001; better and worse are beyond two paired standard errors.\n"
    )
    yield "### Change against the temperature, by size\n"
    yield _means(judged, methods)
    yield "### Better / worse, by size\n"
    yield _comparisons(judged, methods)
    yield "### Promised and found, where the default chose more than the temperature\n"
    yield _promises(judged)
    yield "### What the default chose\n"
    yield _choices(judged)
    yield "### Case by case: NLL of the temperature, and changes against it ± standard error\n"
    yield _by_case(judged, methods)


def _sizes(judged: Sequence[Judged]) -> list[str]:
    return list(dict.fromkeys(cell.size for cell in judged))


def _means(judged: Sequence[Judged], methods: Sequence[str]) -> str:
    groups = {"": (False, True), "unshifted ": (False,), "shifted ": (True,)}
    columns = [(group, size) for group in groups for size in _sizes(judged)]
    rows = []
    for method in methods[1:]:
        cells = []
        for group, size in columns:
            here = [cell for cell in judged if cell.size == size and cell.shifted in groups[group]]
            cells.append(_mean([1000 * cell.change(method)[0] for cell in here if method in cell.losses]))
        rows.append([method, *cells])
    return _table(["method", *(group + size for group, size in columns)], rows)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):+.1f}" if values else ""


def _comparisons(judged: Sequence[Judged], methods: Sequence[str]) -> str:
    """The default against all others, then those against the temperature."""
    pairs = [(_DEFAULT, other) for other in methods if other != _DEFAULT]
    pairs += [(other, _TEMPERATURE) for other in methods if other not in (_DEFAULT, _TEMPERATURE)]
    rows = []
    for method, reference in pairs:
        cells = []
        for size in _sizes(judged):
            here = [cell for cell in judged if cell.size == size and {method, reference} <= cell.losses.keys()]
            changes = [cell.change(method, reference) for cell in here]
            better = sum(change < -2 * error - NOTHING for change, error in changes)
            worse = sum(change > 2 * error + NOTHING for change, error in changes)
            cells.append(f"{better} / {worse} of {len(here)}")
        rows.append([f"{method} against {reference}", *cells])
    return _table(["", *_sizes(judged)], rows)


def _promises(judged: Sequence[Judged]) -> str:
    rows = []
    for size in _sizes(judged):
        own = [cell for cell in judged if cell.size == size and cell.promised]
        found = [cell.change(_DEFAULT) for cell in own]
        scores = [
            (change - cell.promised) / math.hypot(cell.promised_error, error)
            for cell, (change, error) in zip(own, found, strict=True)
        ]
        square = sum(cell.promised**2 for cell in own)
        product = sum(cell.promised * change for cell, (change, _) in zip(own, found, strict=True))
        beyond, rosy = sum(abs(score) > 2 for score in scores), sum(score > 2 for score in scores)
        rows.append(
            [
                size,
                len(own),
                _mean([1000 * cell.promised for cell in own]),
                _mean([1000 * change for change, _ in found]),
                f"{product / square:.2f}" if square else "",
                f"{beyond / len(own):.0%}" if own else "",
                f"{rosy / len(own):.0%}" if own else "",
            ]
        )
    head = "size", "sets", "promised", "found", "slope of found on promised", "beyond two standard errors", "too rosy"
    return _table(head, rows)


def _choices(judged: Sequence[Judged]) -> str:
    rows = []
    for name in sorted({cell.chosen for cell in judged}):
        cells: list[object] = []
        for size in _sizes(judged):
            here = [cell for cell in judged if (cell.chosen, cell.size) == (name, size)]
            change = _mean([1000 * cell.change(_DEFAULT)[0] for cell in here])
            cells.append(f"{len(here)} ({change})" if here else "0")
        rows.append([name, *cells])
    return _table(["chosen: sets (change)", *_sizes(judged)], rows)


def _by_case(judged: Sequence[Judged], methods: Sequence[str]) -> str:
    """The sets of one direction have the same held-out samples, whose losses are averaged over them first."""
    rows = []
    for case in dict.fromkeys(cell.case for cell in judged):
        for size in _sizes(judged):
            here = [cell for cell in judged if (cell.case, cell.size) == (case, size)]
            cells = [f"{float(_averaged(here, _TEMPERATURE).mean()):.4f}"]
            for method in methods[1:]:
                own = [cell for cell in here if method in cell.losses]
                if own:
                    change, error = paired(_averaged(own, method), _averaged(own, _TEMPERATURE))
                    cells.append(f"{1000 * change:+.1f} ± {1000 * error:.1f}")
                else:
                    cells.append("")
            rows.append([case, size, *cells])
    return _table(["case", "size", *methods], rows)


def _averaged(cells: Sequence[Judged], method: str) -> Tensor:
    by_direction: dict[int, list[Tensor]] = {}
    for cell in cells:
        by_direction.setdefault(cell.direction, []).append(cell.losses[method])
    return torch.cat([torch.stack(losses).mean(0) for losses in by_direction.values()])


# The times


def _times(plan: Plan) -> str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_timed(*size) for size in plan.timed]
    finally:
        torch.set_num_threads(threads)
    return f"""### Seconds of a whole fit

Labels are drawn from softmax(z), the logits are 2z and a bias per class. One thread, the best of two, in turns; a small
fit before is not counted.

{_table(["logits", "default", "SVS", "SMS", "default / SVS"], rows)}"""


def _timed(n: int, classes: int) -> list[str]:
    installed = _peers()
    fits: dict[str, Callable[[Tensor, Tensor], object]] = {_DEFAULT: partial(_clamp, grids=())}
    # A matrix of a thousand classes would take its peer minutes.
    fits |= {name: installed[name] for name in (_SVS, _SMS) if name in installed and (name == _SVS or classes < 1000)}
    logits, target = _made(n, classes)
    best: dict[str, float] = {}
    for fit in fits.values():
        fit(*_made(200, 10))
    for _ in range(2):
        for name, fit in fits.items():
            started = time.perf_counter()
            fit(logits, target)
            best[name] = min(best.get(name, math.inf), time.perf_counter() - started)
    seconds = [f"{best[name]:.2f}" if name in best else "" for name in (_DEFAULT, _SVS, _SMS)]
    return [f"{n:,} × {classes:,}", *seconds, f"{best[_DEFAULT] / best[_SVS]:.1f}" if _SVS in best else ""]


def _made(n: int, classes: int) -> Half:
    """Over-confident logits with a bias for each class, float32, and labels."""
    generator = torch.Generator().manual_seed(0)
    truth = 3 * torch.randn(n, classes, generator=generator)
    noise = -(-torch.rand(n, classes, generator=generator).clamp(1e-7, 1 - 1e-7).log()).log()
    return 2 * truth + torch.randn(classes, generator=generator), (truth + noise).argmax(1)
