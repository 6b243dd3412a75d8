"""The output maps on given logits, as candidates: every kind, averaged over strengths of shrinkage."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_clamp._rows import Task
from lightning_clamp.clamping.beta import BetaSpace
from lightning_clamp.clamping.candidate import Candidate, Refusal
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.comparison import Comparison
from lightning_clamp.clamping.criterion import estimate
from lightning_clamp.clamping.map_loss import row_losses, standard_error
from lightning_clamp.clamping.output_map import MapSpace, OutputMap, n_parameters
from lightning_clamp.clamping.paths import ShrinkagePath
from lightning_clamp.clamping.scoring import GridFit
from lightning_clamp.clamping.shrinkage import (
    HEAD_START,
    MapFit,
    Rated,
    Reference,
    average,
    fit_path,
    is_wide_matrix,
    promise,
    shrinkage_path,
    temperature_map,
    with_share,
)
from lightning_clamp.clamping.temperature import fit_temperature

# Products of a pass with a matrix of many classes that are not worth asking first whether it will pay.
_CHEAP = 2e7


def candidates_on(fit: GridFit, comparison: Comparison) -> list[tuple[Candidate, MapFit | None]]:
    """Every output map on the logits of one grid, and what a grid would start from.

    That has no uniform share: what looks like wrong labels may be what a perturbation puts right.
    """
    starts = _temperatures_on(fit, comparison)
    before = row_losses(fit.logits, fit.map_fit.space, fit.map_fit.free)
    alone = _of_temperature(fit, before, starts, comparison)
    found = _FittedMaps(fit, before, starts or [comparison.base], comparison)
    return [alone, *(found.best_of(kind) for kind in comparison.spaces)]


def _temperatures_on(fit: GridFit, comparison: Comparison) -> list[MapFit]:
    """The temperature alone on these logits, and with a uniform share if that pays; none if undetermined."""
    if not fit.size:
        return comparison.alone
    summary, rows, dense = comparison.summary, fit.logits, comparison.summary.dense
    found = fit_temperature(rows, -math.log(float(fit.map_fit.free[-1])))
    if not found.determined:
        return []
    plain = temperature_map(rows, summary.n_classes, found, dense=dense)
    shared = with_share(rows, plain, found, summary.n_rows) if len(comparison.alone) > 1 else None
    return [plain] if shared is None else [plain, shared]


def _of_temperature(
    fit: GridFit, before: list[Tensor], starts: Sequence[MapFit], comparison: Comparison
) -> tuple[Candidate, MapFit | None]:
    if not starts:
        refusal = Refusal("no temperature", "no temperature is best")
        return unfitted(fit, "temperature", comparison, refusal), None
    best = starts[-1]
    losses = before if best is fit.map_fit else row_losses(fit.logits, best.space, best.free)
    return _fitted(fit, before, best, losses, comparison), starts[0]


class _FittedMaps:
    """The output maps on the logits of one grid, kind by kind, the smaller first.

    Where the temperature wants a uniform share, maps with and without one are fitted: what looked like wrong labels to
    the temperature may be what a map puts right.

    Args:
        fit: The grid.
        before: Loss of every row with the map that the grid was fitted with, batch by batch.
        starts: The temperature alone on these logits, and with a uniform share if that pays.
        comparison: What to fit, and what to compare with.
    """

    def __init__(self, fit: GridFit, before: list[Tensor], starts: Sequence[MapFit], comparison: Comparison) -> None:
        self._fit, self._before, self._starts, self._comparison = fit, before, starts, comparison
        first, *shared = starts
        repeats, n_rows = comparison.base.effective_parameters, comparison.summary.n_rows
        if first is fit.map_fit:
            reference = Reference(fit.logits, first, before, repeats, n_rows)
        else:
            reference = Reference.of(fit.logits, first, repeats, n_rows)
        self._reference = reference
        self._rated = [reference.rated(one, row_losses(fit.logits, one.space, one.free)) for one in shared]

    def best_of(self, kind: OutputMap) -> tuple[Candidate, MapFit | None]:
        """The average of all kinds so far, themselves averages; and the best single map of this kind to go on from.

        No grid goes on from a beta map.
        """
        started, fit, comparison = time.perf_counter(), self._fit, self._comparison
        space = comparison.spaces[kind]
        refusal = space if isinstance(space, Refusal) else self._refuse(space)
        if isinstance(space, Refusal) or refusal is not None:
            return unfitted(fit, kind, comparison, refusal), None
        path = shrinkage_path(fit.logits, space, self._reference.fit, dense=comparison.summary.dense)
        by_start = [list(self._along(space, path, start)) for start in self._starts] if path else []
        if not any(by_start):
            refusal = Refusal("no usable map", "no map of that kind has a positive temperature")
            return unfitted(fit, kind, comparison, refusal), None
        for path_of_start in filter(None, by_start):
            mean, losses = average(path_of_start, self._reference, head_start=HEAD_START)
            self._rated.append(self._reference.rated(mean, losses))
        mean, losses = average(self._rated, self._reference)
        candidate = _fitted(fit, self._before, mean, losses, comparison)
        first = next(filter(None, by_start))
        seconds = fit.seconds + time.perf_counter() - started
        # Derivatives in the input are those of maps that are linear in the logits.
        best = None if isinstance(space, BetaSpace) else min(first, key=lambda one: one.criterion).fit
        return replace(candidate, seconds=seconds), best

    def _refuse(self, space: MapSpace) -> Refusal | None:
        if not is_wide_matrix(space) or self._reference.n_rows * space.n_classes**2 <= _CHEAP:
            return None
        best = min(self._rated, key=lambda one: one.criterion, default=None)
        if promise(self._fit.logits, space, self._reference.fit if best is None else best.fit) < 0:
            return None
        return Refusal("promises too little", "its first step promises less than it costs")

    def _along(self, space: MapSpace, path: ShrinkagePath, start: MapFit) -> Iterator[Rated]:
        return fit_path(space.starting_at(start.temperature, start.space.share), path, start, self._reference)


def unfitted(fit: GridFit, kind: OutputMap, comparison: Comparison, refusal: Refusal | None = None) -> Candidate:
    """A candidate's name and cost, and what the first pass said of its grid."""
    candidate = Candidate(
        fit.size,
        kind,
        fit.n_coefficients + n_parameters(kind, comparison.summary.n_classes, comparison.summary.n_labels),
        passes=fit.passes,
        seconds=fit.seconds,
        refusal=refusal,
    )
    if fit.test is None:
        return candidate
    gain_before = comparison.base.nll - fit.history[0]["nll"]
    return replace(
        candidate,
        lm_statistic=fit.test.statistic,
        p_value=fit.test.p_value,
        predicted_gain=gain_before + fit.predicted_gain,
    )


def _fitted(
    fit: GridFit, before: list[Tensor], map_fit: MapFit, losses: list[Tensor], comparison: Comparison
) -> Candidate:
    """A candidate with all its figures; the losses of rows are those with the grid's own map, and with this one."""
    summary, base, kind = comparison.summary, comparison.base, map_fit.space.kind
    effective = fit.effective_coefficients(dense=summary.dense) + map_fit.effective_parameters
    if fit.size:
        effective += comparison.charge
    error = fit.standard_error + (0.0 if losses is before else standard_error(fit.logits, losses, before))
    gain = base.nll - map_fit.nll
    expected = estimate(gain, effective - base.effective_parameters, summary.n_rows, error)
    bare = unfitted(fit, kind, comparison)
    return replace(
        bare,
        n_parameters=bare.n_parameters + map_fit.space.n_free - 1,
        shrinkage=None if kind == "temperature" else map_fit.shrinkage,
        effective_parameters=effective,
        achieved_gain=gain,
        expected_change=expected.change,
        standard_error=expected.standard_error,
        criterion=expected.criterion,
        clamp=_clamp(fit, map_fit, comparison),
    )


def _clamp(fit: GridFit, map_fit: MapFit, comparison: Comparison) -> Clamp:
    """The clamp of a grid and an output map: a common scale is the temperature, the rest is relative to it."""
    dtype, space, binary = comparison.summary.parameter_dtype, map_fit.space, comparison.task == "binary"
    common, (own, bias) = map_fit.free[-1], space.deviations(map_fit.free)
    # A head with one logit has parts of shape (1,) in the place of scalars.
    scalar = (1,) if binary else ()
    parts: dict[str, Tensor] = {}
    if own is not None:
        whole = own + common * (torch.ones_like(own) if own.ndim == 1 else torch.eye(len(own), dtype=own.dtype))
        common = _temperature_scale(map_fit, whole)
        scales = (whole / common).to(dtype)
        parts["class_scale" if own.ndim == 1 else "class_matrix"] = scales[1:] if binary else scales
    if bias is not None:
        parts["class_bias"] = _bias(space.offset(map_fit.free), comparison.task).to(dtype)
    if isinstance(space, BetaSpace):
        parts["skew"] = space.skew(map_fit.free).reshape(scalar).to(dtype)
    if space.share:
        parts["uniform_share"] = torch.full(scalar, space.share, dtype=dtype)
    return Clamp(fit.perturbation, -common.log().to(dtype), **parts)


def _temperature_scale(map_fit: MapFit, whole: Tensor) -> Tensor:
    """1/T of a clamp, positive, where the classes' scales, or a matrix, are ``whole``: what these are relative to."""
    if isinstance(map_fit.space, BetaSpace):
        # The skew is a factor of log-probabilities at that temperature.
        return torch.tensor(1 / map_fit.space.temperature, dtype=torch.float64)
    if map_fit.is_negative:
        return (whole if whole.ndim == 1 else whole.diagonal()).abs().mean()
    return map_fit.free[-1]


def _bias(offset: Tensor, task: Task) -> Tensor:
    """Of classes only differences count."""
    if task == "multilabel":
        return offset
    return offset[1:] - offset[:1] if task == "binary" else offset - offset.mean()
