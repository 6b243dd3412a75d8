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
from lightning_clamp.clamping.passes import CalibrationSet, summed
from lightning_clamp.clamping.perturbation import Grid
from lightning_clamp.clamping.probes import probe, seeds_of

Derivatives: TypeAlias = LossDerivatives | BlockDerivatives

# Backward passes of random signs for the curvature of dense outputs: each tells as much of it, item by item, as scores
# do of that of class outputs.
_PROBES = 1
# Items whose scores are multiplied at once: adding up products takes as long as forming them for some hundred.
_LEAST_ROWS = 2048
# Parameters of a map whose block is most of the work: it is formed in float32, and factorised once.
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

    Returns:
        For every grid the sums in (coefficients, free parameters of the map).
    """
    of_map = known.of_map if isinstance(known, BlockDerivatives) else None
    n_probes = _PROBES if dense else 0

    def batch_sums() -> Iterator[tuple[Tensor, ...]]:
        for inputs, target in data.read(what):
            (gradient, scores), *probes = _input_scores(data, inputs, target, perturbation, space, free, n_probes)
            held.append((scores, *(grid.project(gradient) for grid in grids)))
            curvatures = [_curvature(probes, grid) for grid in grids] if probes else []
            if curvatures or sum(len(batch[0]) for batch in held) >= _LEAST_ROWS:
                yield _products(held, curvatures, with_map=of_map is None)
                held.clear()
        if held:
            yield _products(held, [], with_map=of_map is None)

    held: list[tuple[Tensor, ...]] = []
    q = len(free)
    shapes = [(q,), *([(q, q)] if of_map is None else [])]
    for p in (grid.n_coefficients for grid in grids):
        shapes += [(p,), (p, p), (p, q), *([(p + q, p + q)] if n_probes else [])]
    sum_of_map, *total = summed(batch_sums(), shapes, data.ranks)
    block = of_map or MapBlock(total.pop(0))
    each = len(total) // len(grids)
    parts = [total[i : i + each] for i in range(0, len(total), each)]
    return [_derivatives(sum_of_map, block, *part) for part in parts]


def _products(held: list[tuple[Tensor, ...]], curvatures: list[Tensor], *, with_map: bool) -> tuple[Tensor, ...]:
    """Sums of the scores of some batches, and their outer products: the map's, each grid's, and those of both.

    Args:
        held: Of every batch the scores in the map, ``(N, q)``, and in every grid, ``(N, p)``.
        curvatures: Of every grid, for dense outputs.
        with_map: Whether to form the outer products of the map's own.
    """
    of_map, *of_grids = (torch.cat(scores) for scores in zip(*held, strict=True))
    # They say where to step and how sure that is, for which seven digits are enough.
    many = of_map.float() if of_map.shape[1] > _MANY else of_map
    terms = [of_map.sum(0), *([many.T @ many] if with_map else [])]
    for i, of_grid in enumerate(of_grids):
        terms += [of_grid.sum(0), of_grid.T @ of_grid, of_grid.to(many.dtype).T @ many, *curvatures[i : i + 1]]
    return tuple(terms)


def _derivatives(
    sum_of_map: Tensor, block: MapBlock, gradient: Tensor, own: Tensor, cross: Tensor, curvature: Tensor | None = None
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
) -> list[tuple[Tensor, Tensor]]:
    """The loss's gradient to every input of a batch, and every item's score in the map, ``(N, q)``; those of probes."""
    logits, moved = data.tracked(inputs, perturbation)
    rows = data.rows(logits, target)
    fixed = rows._replace(logits=rows.logits.detach()).doubled()
    found: list[tuple[Tensor, Tensor]] = []
    for slopes in _slopes(inputs, fixed, space.apply(fixed.logits, free, fixed.label).softmax(1), n_probes):
        in_logits = space.pull_logits(fixed.logits, slopes, free, fixed.label).to(rows.logits.dtype)
        (gradient,) = torch.autograd.grad(rows.logits, moved, in_logits, retain_graph=len(found) < n_probes)
        found.append((gradient, space.pull_per_item(fixed, slopes)))
    return found


def _slopes(inputs: Inputs, rows: Rows, probs: Tensor, n_probes: int) -> list[Tensor]:
    """What is passed back from the mapped logits: the loss's own derivatives, and probes."""
    seeds = seeds_of(inputs) if n_probes else None
    probes = [] if seeds is None else [probe(probs, rows, seeds.to(probs.device), k) for k in range(n_probes)]
    return [errors(probs, rows), *probes]


def _curvature(probes: list[tuple[Tensor, Tensor]], grid: Grid) -> Tensor:
    """Fisher information of one batch in (coefficients, map), from what probes passed back."""
    scores = torch.cat([torch.cat([grid.project(gradient), of_map], 1) for gradient, of_map in probes])
    return scores.T @ scores / len(probes)
