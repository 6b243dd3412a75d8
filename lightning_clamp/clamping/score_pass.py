"""One forward and one backward to the input: scores and curvature in perturbation and output map together."""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_clamp._batch import Inputs
from lightning_clamp._rows import Rows
from lightning_clamp.clamping.blocks import BlockDerivatives, MapBlock
from lightning_clamp.clamping.map_loss import errors
from lightning_clamp.clamping.newton import LossDerivatives
from lightning_clamp.clamping.output_map import MapSpace
from lightning_clamp.clamping.passes import CalibrationSet, Logits, summed
from lightning_clamp.clamping.perturbation import Grid, project
from lightning_clamp.clamping.probes import probe, seeds_of

Derivatives: TypeAlias = LossDerivatives | BlockDerivatives

# Backward passes of random signs for the curvature of dense outputs: each tells as much of it, item by item, as scores
# do of that of class outputs.
_PROBES = 1
# Items whose scores are multiplied at once: adding up products takes as long as forming them for some hundred.
_LEAST_ROWS = 2048
# Of their products' rows that are computed at once, from the diagonal on.
_PANEL = 256
# Parameters of a map whose block is most of the work: its scores are float32, and it is factorised once.
_MANY = 1000


def score_pass(
    data: CalibrationSet,
    perturbation: Tensor | None,
    space: MapSpace,
    free: Tensor,
    grids: Sequence[Grid],
    *,
    dense: bool,
    what: str,
    known: Derivatives | None = None,
    keep: Logits | None = None,
) -> list[Derivatives]:
    """One forward and one backward to the input: the score sums of every grid.

    Args:
        data: Network and batches.
        perturbation: The point in input space, the shape of one input; None for the origin.
        space: Kind of the output map,
        free: and its free parameters there.
        grids: Grids whose coefficients to differentiate in. They share the pass: since the perturbation is added to
            every input, the input gradient projected on a grid is the sample's score.
        dense: Whether items have several rows. If not, the curvature is the covariance; else it takes another backward
            pass, see :mod:`.probes`.
        what: Shown as progress.
        known: Sums of the one grid at an earlier point, of which is kept what costs much and changes little: the own
            block of a map of many parameters. None to form all.
        keep: Is given the logits, which the pass has anyway.

    Returns:
        For every grid the sums in (coefficients, free parameters of the map).
    """
    of_map = known.of_map if isinstance(known, BlockDerivatives) else None
    n_probes = _PROBES if dense else 0

    def batch_sums() -> Iterator[tuple[Tensor, ...]]:
        for inputs, target in data.read(what):
            (gradient, scores), *probes = _input_scores(data, inputs, target, perturbation, space, free, n_probes, keep)
            held.append((scores, torch.cat(project(gradient, grids), 1)))
            curvatures = _curvatures(probes, grids) if probes else []
            if curvatures or sum(len(batch[0]) for batch in held) >= _LEAST_ROWS:
                yield (*_products(held, sizes, with_map=of_map is None), *curvatures)
                held.clear()
        if held:
            yield _products(held, sizes, with_map=of_map is None)

    # Once: what is sent to an accelerator has to wait for all it is at work on.
    free, grids = free.to(data.device), [grid.on(data.device) for grid in grids]
    held: list[tuple[Tensor, Tensor]] = []
    q, sizes = len(free), [grid.n_coefficients for grid in grids]
    shapes = [(q,), (sum(sizes),), (sum(sizes), q), *((p, p) for p in sizes), *([(q, q)] if of_map is None else [])]
    shapes += [(p + q, p + q) for p in sizes] if n_probes else []
    sum_of_map, sum_of_grids, cross, *squares = summed(batch_sums(), shapes, data.ranks)
    own, squares = squares[: len(grids)], squares[len(grids) :]
    block = of_map or MapBlock(squares.pop(0))
    curvatures: list[Tensor | None] = [*squares] or [None] * len(grids)
    parts = zip(torch.split(sum_of_grids, sizes), own, torch.split(cross, sizes), curvatures, strict=True)
    return [_derivatives(sum_of_map, block, *part) for part in parts]


def _products(held: list[tuple[Tensor, Tensor]], sizes: list[int], *, with_map: bool) -> tuple[Tensor, ...]:
    """Sums of the scores of some batches, and their outer products.

    Args:
        held: Of every batch the scores in the map, ``(N, q)``, and in all grids, ``(N, p)``.
        sizes: Numbers of the grids' coefficients.
        with_map: Whether to form the outer products of the map's own.

    Returns:
        The map's sum and the grids'; the outer products of grids and map, of each grid, and of the map.
    """
    # Batch by batch, so that no copy of all is made in float64.
    sum_of_map = torch.stack([scores.sum(0, dtype=torch.float64) for scores, _ in held]).sum(0)
    of_map, of_grids = (torch.cat(scores) for scores in zip(*held, strict=True))
    cross = of_grids.to(of_map.dtype).T @ of_map
    own = [part.T @ part for part in torch.split(of_grids, sizes, dim=1)]
    return (sum_of_map, of_grids.sum(0), cross, *own, *([_square(of_map)] if with_map else []))


def _square(scores: Tensor) -> Tensor:
    """``scores.T @ scores``, of whose two halves only one is computed."""
    count = scores.shape[1]
    total = scores.new_empty(count, count)
    for first in range(0, count, _PANEL):
        panel = scores[:, first : first + _PANEL].T @ scores[:, first:]
        total[first : first + _PANEL, first:] = panel
        total[first:, first : first + _PANEL] = panel.T
    return total


def _derivatives(
    sum_of_map: Tensor, block: MapBlock, gradient: Tensor, own: Tensor, cross: Tensor, curvature: Tensor | None
) -> Derivatives:
    """Of one grid: in blocks where the map has many parameters, else as one."""
    gradient, q = torch.cat([gradient, sum_of_map]), len(sum_of_map)
    if curvature is None and q > _MANY:
        return BlockDerivatives(gradient, own, cross, block, torch.zeros(q, dtype=torch.float64))
    covariance = torch.cat([torch.cat([own, cross], 1), torch.cat([cross.T, block.products], 1)])
    return LossDerivatives(gradient, covariance if curvature is None else curvature, covariance)


def _input_scores(
    data: CalibrationSet,
    inputs: Inputs,
    target: Tensor,
    perturbation: Tensor | None,
    space: MapSpace,
    free: Tensor,
    n_probes: int = 0,
    keep: Logits | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """The loss's gradient to every input of a batch, and every item's score in the map, ``(N, q)``; those of probes."""
    logits, moved = data.tracked(inputs, perturbation)
    if keep is not None:
        keep.keep(logits, target)
    rows = data.rows(logits, target)
    space = space.beside(logits)
    fixed = rows._replace(logits=rows.logits.detach()).doubled()
    slopes = _slopes(inputs, fixed, space.apply(fixed.logits, free, fixed.label).softmax(1), n_probes)
    # Scores say where to step and how sure that is, for which seven digits are enough.
    scored = fixed._replace(logits=fixed.logits.float()) if len(free) > _MANY else fixed
    found: list[tuple[Tensor, Tensor]] = []
    for slope in slopes:
        in_logits = space.pull_logits(fixed.logits, slope, free, fixed.label).to(rows.logits.dtype)
        (gradient,) = torch.autograd.grad(rows.logits, moved, in_logits, retain_graph=len(found) < n_probes)
        found.append((gradient, space.pull_per_item(scored, slope.to(scored.logits))))
    return found


def _slopes(inputs: Inputs, rows: Rows, probs: Tensor, n_probes: int) -> list[Tensor]:
    """What is passed back from the mapped logits: the loss's own derivatives, and probes."""
    seeds = seeds_of(inputs) if n_probes else None
    probes = [] if seeds is None else [probe(probs, rows, seeds.to(probs.device), k) for k in range(n_probes)]
    return [errors(probs, rows), *probes]


def _curvatures(probes: list[tuple[Tensor, Tensor]], grids: Sequence[Grid]) -> list[Tensor]:
    """Fisher information of one batch in (coefficients of a grid, map), from what probes passed back."""
    projected = [(project(gradient, grids), of_map) for gradient, of_map in probes]
    scores = [
        torch.cat([torch.cat([own[number], of_map], 1) for own, of_map in projected]) for number in range(len(grids))
    ]
    return [one.T @ one / len(probes) for one in scores]
