"""Which rule to choose an output map by: each applied to the same fits, judged by data that were held out.

Output maps need the logits only, so that many calibration sets can be drawn from one pass of a network.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from cases import load
from methods import NOTHING, OneBatch, forward, paired, unshrunk_vector
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._rows import as_rows
from lightning_clamp.clamping.criterion import estimate
from lightning_clamp.clamping.map_loss import map_derivatives, row_losses, standard_error
from lightning_clamp.clamping.moments import logit_moments
from lightning_clamp.clamping.newton import effective_parameters
from lightning_clamp.clamping.output_map import map_space
from lightning_clamp.clamping.shrinkage import (
    HEAD_START,
    SHRINKAGES,
    MapFit,
    Reference,
    average,
    fit_path,
    shrinkage_path,
    temperature_map,
)
from lightning_clamp.clamping.temperature import fit_temperature

SIZES = (250, 500, 1000, 2500, 5000)
SMALL = ("cifar100-densenet",)
FULL = (
    "cifar10-resnet20",
    "cifar10-resnet20 jpeg 60",
    "cifar10-resnet20 noise 0.03",
    "cifar10-resnet20 blur 0.5",
    "cifar10-resnet20 contrast 0.5",
    "cifar10-resnet20 brightness 0.6",
    "cifar100-resnet32",
    "cifar100-resnet32 jpeg 60",
    "cifar100-resnet32 contrast 0.5",
    "cifar100-densenet",
)


class Trial(NamedTuple):
    """Vector scaling with one shrinkage, against the temperature alone, in nats per sample.

    Attributes:
        gain: On the calibration set.
        effective: Effective parameters beyond the temperature's, by the curvature at the temperature, over n.
        takeuchi: The same by the curvature and the covariance of the scores at the fit.
        error: Standard error of the gain.
        held: Losses of the held-out samples.
    """

    gain: float
    effective: float
    takeuchi: float
    error: float
    held: Tensor


class Draw(NamedTuple):
    """One calibration set: held-out losses of the temperature; vector scaling unshrunk, by shrinkage, and averaged."""

    size: int
    temperature: Tensor
    vector: Trial | None
    trials: Sequence[Trial]
    averaged: Trial | None


Rule = Callable[[Trial], float]
RULES: dict[str, Rule] = {
    "Akaike": lambda t: t.effective - t.gain,
    "Akaike + ½ standard error": lambda t: t.effective - t.gain + 0.5 * t.error,
    "Akaike + 1 standard error": lambda t: t.effective - t.gain + t.error,
    "Akaike + 2 standard errors": lambda t: t.effective - t.gain + 2 * t.error,
    "1.5 × Akaike's penalty": lambda t: 1.5 * t.effective - t.gain,
    "twice Akaike's penalty": lambda t: 2 * t.effective - t.gain,
    "Takeuchi": lambda t: t.takeuchi - t.gain,
    "Takeuchi + 1 standard error": lambda t: t.takeuchi - t.gain + t.error,
}


def report(folder: Path, full: bool) -> Iterator[str]:
    """The table, in Markdown."""
    draws = [draw for case in (FULL if full else SMALL) for draw in _draws(case, folder, 4 if full else 2)]
    yield f"""## The criterion

Every rule chooses between the temperature and vector scaling with one of {len(SHRINKAGES)} shrinkages, on
{len(draws)} calibration sets of {len(FULL if full else SMALL)} networks and data; the default averages over the
shrinkages, and then takes that or the temperature. Mean change of the held-out NLL against temperature scaling in units
of .001, by size; cells that are worse than temperature or vector scaling by more than two paired standard errors, and
by how much at most.
"""
    yield f"| rule | {' | '.join(map(str, SIZES))} | worse than T | at most | worse than vector | at most |"
    yield "|" + "---|" * (len(SIZES) + 5)
    yield _line("vector scaling, not shrunk", [(draw, draw.vector.held) for draw in draws if draw.vector])
    unshrunk = [(draw, [draw.vector] if draw.vector else []) for draw in draws]
    for name in ("Akaike", "twice Akaike's penalty"):
        yield _line(f"{name}, not shrunk", [(draw, _chosen(draw, RULES[name], trials)) for draw, trials in unshrunk])
    for name, rule in RULES.items():
        yield _line(name, [(draw, _chosen(draw, rule, draw.trials)) for draw in draws])
    yield _line("average over all shrinkages (the default)", [(draw, _default(draw)) for draw in draws])


def _draws(case: str, folder: Path, n: int) -> Iterator[Draw]:
    problem = load(case, folder)
    logits, target = forward(problem).double(), problem.target
    for seed in range(n):
        order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
        held = order[len(order) // 2 :]
        for size in SIZES:
            part = order[: len(order) // 2][:size]
            yield _draw(logits[part], target[part], logits[held], target[held])


def _draw(logits: Tensor, target: Tensor, held: Tensor, held_target: Tensor) -> Draw:
    rows, (n, classes) = OneBatch([as_rows(logits, target)]), logits.shape
    base = temperature_map(rows, classes, fit_temperature(rows), dense=False)
    space = map_space("vector", logit_moments(rows, classes))

    def losses(fit: MapFit) -> Tensor:
        return F.cross_entropy(fit.space.apply(held, fit.free), held_target, reduction="none")

    def trial(fit: MapFit) -> Trial:
        at_fit = map_derivatives(rows, space, fit.free, dense=True)
        return Trial(
            base.nll - fit.nll,
            (fit.effective_parameters - base.effective_parameters) / n,
            (effective_parameters(at_fit, fit.ridge) - 1) / n,
            standard_error(rows, row_losses(rows, space, fit.free), against.losses),
            losses(fit),
        )

    steps = shrinkage_path(rows, space, base, dense=False)
    against = Reference.of(rows, base, 1.0, n)
    path = [] if steps is None else list(fit_path(space, steps, base, against))
    unshrunk = unshrunk_vector(logits, target)
    vector = None if unshrunk is None else trial(unshrunk)
    averaged = trial(average(path, against, head_start=HEAD_START)[0]) if path else None
    return Draw(n, losses(base), vector, [trial(fit) for fit, _ in path], averaged)


def _chosen(draw: Draw, rule: Rule, trials: Sequence[Trial]) -> Tensor:
    best = min(trials, key=rule, default=None)
    return draw.temperature if best is None or rule(best) >= 0 else best.held


def _default(draw: Draw) -> Tensor:
    """The average, where the criterion of the package accepts it."""
    trial = draw.averaged
    if trial is None:
        return draw.temperature
    expected = estimate(trial.gain, trial.effective * draw.size, draw.size, trial.error)
    return trial.held if expected.criterion < 0 else draw.temperature


def _line(name: str, choices: Sequence[tuple[Draw, Tensor]]) -> str:
    by_size: dict[int, list[float]] = {size: [] for size in SIZES}
    worse: dict[str, list[float]] = {"temperature": [], "vector": []}
    for draw, losses in choices:
        by_size[draw.size].append(1000 * float((losses - draw.temperature).mean()))
        references = {"temperature": draw.temperature} | ({"vector": draw.vector.held} if draw.vector else {})
        for other, reference in references.items():
            mean, error = paired(losses, reference)
            if mean > 2 * error + NOTHING:
                worse[other].append(1000 * mean)
    cells = [f"{sum(values) / len(values):+.1f}" if values else "" for values in by_size.values()]
    cells += [cell for values in worse.values() for cell in (str(len(values)), f"{max(values, default=0):+.1f}")]
    return f"| {name} | {' | '.join(cells)} |"
