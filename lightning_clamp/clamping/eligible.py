"""Which grids and output maps the inputs have and the data can feed; the others are refused, with a reason."""

from collections.abc import Iterable

from lightning_clamp.clamping.candidate import Candidate, Refusal
from lightning_clamp.clamping.labels import LabelMoments
from lightning_clamp.clamping.moments import LogitMoments
from lightning_clamp.clamping.output_map import OutputMap, n_parameters
from lightning_clamp.clamping.perturbation import Grid, available_sizes, make_grid
from lightning_clamp.clamping.summary import MIN_SAMPLES, DatasetSummary

# A matrix has as many entries as classes squared, and so many more numbers to multiply with in every forward pass; of
# correlated rows its whole curvature is formed, and that has as many as that squared.
_MOST_MATRIX_CLASSES = 300
_MOST_DENSE_MATRIX_CLASSES = 30
# Below this many samples the estimate of the held-out change is itself too uncertain, for a map of ten parameters.
FEWEST = 100


def eligible_grids(sizes: Iterable[int], summary: DatasetSummary) -> tuple[list[Grid], list[Candidate]]:
    """The grids to consider, and a record of each that was refused."""
    eligible: list[Grid] = []
    refused: list[Candidate] = []
    for size in sorted(set(sizes)):
        if refusal := _refuse_inputs(size, summary):
            refused.append(Candidate(size, "temperature", 0, refusal=refusal))
            continue
        assert summary.shape is not None
        grid = make_grid(size, summary.shape)
        if refusal := _refuse_grid(grid, summary):
            refused.append(Candidate(size, "temperature", grid.n_coefficients + 1, refusal=refusal))
        else:
            eligible.append(grid)
    return eligible, refused


def refuse_map(
    kind: OutputMap, moments: LogitMoments, n_independent: float, *, kept: bool, dense: bool
) -> Refusal | None:
    """Why an output map of this kind is not fitted; None if it is.

    Args:
        kind: Which.
        moments: Of the logits.
        n_independent: Independent rows that say what the rows of the calibration set do.
        kept: Whether the logits are in memory; where they are not, each of the dozens of times that they are read is a
            forward pass.
        dense: Whether there are rows for every pixel.
    """
    n_classes, by_label = len(moments.counts), isinstance(moments, LabelMoments)
    if moments.is_one_class:
        return Refusal("one class", "all labels are the same")
    most = _MOST_DENSE_MATRIX_CLASSES if dense else _MOST_MATRIX_CLASSES
    if kind == "beta" and (by_label or n_classes != 2):
        return Refusal("no two classes", "it is for two classes")
    if kind == "matrix" and n_classes > most:
        return Refusal("no such matrix", f"a matrix is for {most} classes at most")
    if kind in ("beta", "matrix") and not kept:
        return Refusal("too many passes", "the logits exceed `cache_bytes`, and it would take dozens of forward passes")
    if kind == "matrix" and moments.masked:
        return Refusal("masked", "a matrix would mix masked logits into the others")
    needed = min(FEWEST, MIN_SAMPLES * (n_parameters(kind, n_classes, n_classes if by_label else 0) - 1))
    if n_independent < needed:
        return Refusal("too few samples for the map", f"{n_independent:.0f} samples are fewer than {needed}")
    return None


def _refuse_inputs(size: int, summary: DatasetSummary) -> Refusal | None:
    if summary.n_inputs > 1 and summary.shape is None:
        return Refusal("several inputs", "there are several inputs, and perturb_at names no submodule")
    if not summary.float_inputs:
        return Refusal(
            "integer inputs",
            "nothing can be added to integer inputs: perturb_at can name the submodule that is fed the embeddings",
        )
    if summary.shape is None:
        return Refusal("inputs differ in shape", "the inputs differ in shape")
    if not available_sizes([size], summary.shape):
        return Refusal("no such grid", f"inputs of shape {summary.shape} have no such grid")
    return None


def refuse_grids(moments: LogitMoments) -> Refusal | None:
    """Why no grid is fitted: a perturbation acts on all classes, also on those of which the set says nothing."""
    if moments.is_one_class:
        return Refusal("one class", "all labels are the same")
    if moments.are_missing:
        return Refusal("missing classes", "the labels of some classes are missing, on which a perturbation acts too")
    return None


def _refuse_grid(grid: Grid, summary: DatasetSummary) -> Refusal | None:
    if grid.n_coefficients * MIN_SAMPLES > summary.n_samples:
        return Refusal(
            "too few samples for the grid",
            f"{summary.n_samples} samples are fewer than {MIN_SAMPLES} per coefficient",
        )
    return None
