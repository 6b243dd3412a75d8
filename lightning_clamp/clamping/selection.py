"""Which grid, which output map: what may be worth its cost is fitted, and one criterion decides."""

from collections.abc import Sequence

from lightning_clamp.clamping.candidate import Candidate, Refusal
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.comparison import Comparison, compare
from lightning_clamp.clamping.eligible import eligible_grids, refuse_grids
from lightning_clamp.clamping.gradient import gradient_problem
from lightning_clamp.clamping.map_candidates import candidates_on, unfitted
from lightning_clamp.clamping.moments import LogitMoments
from lightning_clamp.clamping.options import ClampOptions
from lightning_clamp.clamping.outcome import MethodOutcome
from lightning_clamp.clamping.output_map import OUTPUT_MAPS
from lightning_clamp.clamping.passes import CalibrationSet
from lightning_clamp.clamping.ranks import Ranks
from lightning_clamp.clamping.reason import reason
from lightning_clamp.clamping.scoring import first_pass, fit_grid, start_without_grid
from lightning_clamp.clamping.shrinkage import MapFit, is_wide_matrix
from lightning_clamp.clamping.summary import DatasetSummary
from lightning_clamp.clamping.temperature import NO_TEMPERATURE, TemperatureFit

# Entries of the curvature of an output map that a grid is fitted together with; some eight such matrices are held at
# once, 2 GB in all.
_MOST_CURVATURE = 2**25


def choose_clamp(
    data: CalibrationSet, summary: DatasetSummary, base: TemperatureFit, options: ClampOptions
) -> MethodOutcome:
    r"""Fit output maps, then grids on top of the best of them, and choose by the expected held-out loss.

    The output maps are a scale and a bias per class, or a matrix, shrunk towards the temperature (:mod:`~.shrinkage`).
    The perturbation is a smooth image, spanned by an r×r grid of coefficients per channel, fitted together with the
    best output map by Fisher scoring. One pass says what every grid promises; a grid is fitted only where that is
    better than the best candidate so far, the most promising first, and all output maps are then fitted again on its
    logits. The choice is that of :mod:`~.criterion`.

    Args:
        data: Network and batches, frozen.
        summary: First look at the same data.
        base: Temperature scaling of the unchanged logits.
        options: What to consider.
    """
    if not base.determined:
        # Every sample is right, and the colder the better, with any output map; or all outputs are the same.
        return MethodOutcome(Clamp(), summary.logits, NO_TEMPERATURE)
    comparison = compare(summary, base, options, data.spec.task)
    grids, refused = eligible_grids(options.grids, summary)
    if grids and (refusal := refuse_grids(comparison.moments) or _no_gradient(data)) is not None:
        refused += [Candidate(grid.size, "temperature", grid.n_coefficients + 1, refusal=refusal) for grid in grids]
        grids = []
    fitted = candidates_on(start_without_grid(summary, comparison.base), comparison)
    candidates = refused + [candidate for candidate, _ in fitted]
    alone = comparison.best_of([one for one, _ in fitted])
    chosen, logits, history = alone, summary.logits, []
    best, map_fit = _best_to_go_on_from(fitted, comparison)
    start = start_without_grid(summary, map_fit, best.standard_error or 0.0)
    if map_fit.is_negative:
        # Steps of a grid are bounded by the common scale.
        grids = []
    firsts = first_pass(data, summary, start, grids)
    for grid, first in sorted(zip(grids, firsts, strict=True), key=lambda pair: pair[1].predicted.criterion):
        ahead = chosen.rank - alone.rank
        # The first pass often promises too little: what a perturbation is charged on top is for what was fitted.
        if first.predicted.criterion >= ahead:
            refusal = Refusal("costs more than it promises", "the first pass promises less than it costs")
            candidates.append(unfitted(first, map_fit.space.kind, comparison, refusal))
            continue
        fit = fit_grid(data, summary, grid, first, options.max_passes, ahead - comparison.charge / summary.n_rows)
        if fit.perturbation is None:
            refusal = Refusal("no step helps", "no step was taken, or none lowered the loss")
            candidates.append(unfitted(fit, map_fit.space.kind, comparison, refusal))
            continue
        history += [{"grid": grid.size, **step} for step in fit.history]
        on_grid = [candidate for candidate, _ in candidates_on(fit, comparison)]
        candidates += on_grid
        if (better := comparison.best_of(on_grid)).rank < chosen.rank:
            chosen, logits = better, fit.logits
    assert chosen.clamp is not None
    _warn_of_unseen(comparison.moments, data.ranks)
    candidates.sort(key=lambda one: (one.grid, OUTPUT_MAPS.index(one.output_map)))
    return MethodOutcome(chosen.clamp, logits, reason(chosen, candidates), tuple(candidates), chosen, tuple(history))


def _best_to_go_on_from(
    fitted: Sequence[tuple[Candidate, MapFit | None]], comparison: Comparison
) -> tuple[Candidate, MapFit]:
    """The best map whose curvature a grid's fits in memory beside; with thousands of classes the temperature."""

    def is_small(fit: MapFit) -> bool:
        return len(fit.free) ** 2 <= _MOST_CURVATURE and not is_wide_matrix(fit.space)

    small = [(one, fit) for one, fit in fitted if fit is not None and is_small(fit)]
    best = comparison.best_of([one for one, _ in small])
    return next(pair for pair in small if pair[0] is best)


def _no_gradient(data: CalibrationSet) -> Refusal | None:
    problem = gradient_problem(data)
    return None if problem is None else Refusal("no gradient", problem)


def _warn_of_unseen(moments: LogitMoments, ranks: Ranks) -> None:
    if moments.are_missing:
        ranks.warn(
            moments.warning_of_unseen,
            stacklevel=4,
        )
