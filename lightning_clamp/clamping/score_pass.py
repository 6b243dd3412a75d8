"""One forward and one backward to the input: scores and curvature in perturbation and output map together."""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_clamp._batch import Inputs, chunks
from lightning_clamp.clamping.blocks import BlockDerivatives, MapBlock
from lightning_clamp.clamping.map_loss import errors
from lightning_clamp.clamping.newton import LossDerivatives
from lightning_clamp.clamping.output_map import MapSpace
from lightning_clamp.clamping.passes import CalibrationSet, Logits, summed
from lightning_clamp.clamping.perturbation import Grid, project

Derivatives: TypeAlias = LossDerivatives | BlockDerivatives

# Finite-difference step of the curvature of dense outputs, as a fraction of the root mean square of the inputs: small
# enough to stay on the network's tangent, large enough to stand out of float32 rounding.
_STEP = 0.01
# Items whose scores are multiplied at once: adding up products takes as long as forming them for some hundred.
_LEAST_ROWS = 2048
# Parameters of a map whose block is most of the work: its scores are float32, and it is factorised once.
_MANY = 1000
# Rows of finite differences held at once, in elements.
_CHUNK_ELEMENTS = 2**25


def score_pass(
    data: CalibrationSet,
    perturbation: Tensor | None,
    space: MapSpace,
    free: Tensor,
    grids: Sequence[Grid],
    *,
    dense_scale: float | None,
    what: str,
    known: Derivatives | None = None,
) -> tuple[list[Derivatives], Logits]:
    """One forward and one backward to the input: the score sums of every grid, and the logits passed on the way.

    Args:
        data: Network and batches.
        perturbation: The point in input space, the shape of one input; None for the origin.
        space: Kind of the output map,
        free: and its free parameters there.
        grids: Grids whose coefficients to differentiate in. They share the pass: since the perturbation is added to
            every input, the input gradient projected on a grid is the sample's score.
        dense_scale: For dense outputs, the root mean square of the inputs, which sets the finite-difference step of
            their curvature; None for class outputs, whose curvature is the covariance.
        what: Shown as progress.
        known: Sums of the one grid at an earlier point, of which is kept what costs much and changes little: the
            curvature of dense outputs, and the own block of a map of many parameters. None to form all.

    Returns:
        For every grid the sums in (coefficients, free parameters of the map); and the logits.
    """
    logits_seen = Logits(data, perturbation)
    of_map = known.of_map if isinstance(known, BlockDerivatives) else None
    differences = 0.0 if dense_scale is None or known is not None else _STEP * (dense_scale or 1.0)

    def batch_sums() -> Iterator[tuple[Tensor, ...]]:
        for inputs, target in data.read(what):
            logits, gradient, scores = _input_scores(data, inputs, target, perturbation, space, free)
            logits_seen.keep(logits, target)
            held.append((scores, torch.cat(project(gradient, grids), 1)))
            curvatures = []
            if differences:
                most = _CHUNK_ELEMENTS // logits[:1].numel()
                curvatures = [
                    _gauss_newton(data, inputs, target, perturbation, space, free, grid, differences, most)
                    for grid in grids
                ]
            if curvatures or sum(len(batch[0]) for batch in held) >= _LEAST_ROWS:
                yield (*_products(held, sizes, with_map=of_map is None), *curvatures)
                held.clear()
        if held:
            yield _products(held, sizes, with_map=of_map is None)

    held: list[tuple[Tensor, Tensor]] = []
    q, sizes = len(free), [grid.n_coefficients for grid in grids]
    shapes = [(q,), (sum(sizes),), (sum(sizes), q), *((p, p) for p in sizes), *([(q, q)] if of_map is None else [])]
    shapes += [(p + q, p + q) for p in sizes] if differences else []
    sum_of_map, sum_of_grids, cross, *squares = summed(batch_sums(), shapes, data.ranks)
    own, squares = squares[: len(grids)], squares[len(grids) :]
    block = of_map or MapBlock(squares.pop(0))
    if differences:
        # The curvature of dense outputs took a forward pass per coefficient, and one to compare with.
        data.passes += sum(p + 1 for p in sizes)
    curvatures: list[Tensor | None] = [*squares] or [None] * len(grids)
    if dense_scale is not None and isinstance(known, LossDerivatives):
        curvatures = [known.curvature]
    parts = zip(torch.split(sum_of_grids, sizes), own, torch.split(cross, sizes), curvatures, strict=True)
    return [_derivatives(sum_of_map, block, *part) for part in parts], logits_seen


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
    return (sum_of_map, of_grids.sum(0), cross, *own, *([of_map.T @ of_map] if with_map else []))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of one batch, the loss's gradient to every input, and every item's score in the map, ``(N, q)``."""
    logits, moved = data.tracked(inputs, perturbation)
    rows = data.rows(logits, target)
    fixed = rows._replace(logits=rows.logits.detach()).doubled()
    error = errors(space.apply(fixed.logits, free, fixed.label).softmax(1), fixed)
    in_logits = space.pull_logits(fixed.logits, error, free, fixed.label).to(rows.logits.dtype)
    (gradient,) = torch.autograd.grad(rows.logits, moved, in_logits)
    if len(free) > _MANY:
        # The scores say where to step and how sure that is, for which seven digits are enough.
        fixed, error = fixed._replace(logits=fixed.logits.float()), error.float()
    return logits.detach(), gradient, space.pull_per_item(fixed, error)


def _gauss_newton(
    data: CalibrationSet,
    inputs: Inputs,
    target: Tensor,
    perturbation: Tensor | None,
    space: MapSpace,
    free: Tensor,
    grid: Grid,
    step: float,
    most_columns: int,
) -> Tensor:
    r"""Fisher information :math:`\sum J^T (\mathrm{diag}(p) - p p^T) J` of one batch in (coefficients, map).

    The pixels of an image are correlated, so the outer product of its summed score says nothing about curvature. The
    columns of J that belong to coefficients are taken by forward differences of the logits: a forward pass each, no
    graph, a positive semi-definite result that is the same for any batch size. ``step`` is that of the differences; at
    most ``most_columns`` of them, of one item each, are held at once.
    """
    images = [grid.image(unit) for unit in step * torch.eye(grid.n_coefficients, dtype=torch.float64)]
    p = len(images)
    n = p + len(free)
    total = torch.zeros(n, n, dtype=torch.float64, device=target.device)
    with torch.no_grad():
        chunk = max(1, most_columns // (p + 1))
        for part, labels in zip(chunks(inputs, chunk), torch.split(target, chunk), strict=True):
            rows = data.rows(data.perturbed_logits(part, perturbation), labels).doubled()
            logits = rows.logits
            columns = []
            for image in images:
                moved = image if perturbation is None else perturbation.cpu() + image
                there = data.rows(data.perturbed_logits(part, moved), labels).doubled().logits
                columns.append(space.linear(there - logits, free, rows.label) / step)
            jacobian = torch.stack(columns)  # (p, M, C)
            probs = space.apply(logits, free, rows.label).softmax(1)
            centred = jacobian - (jacobian * probs).sum(2, keepdim=True)
            weighted = centred * probs
            across = torch.stack([space.pull(logits, column, rows.label) for column in weighted])
            total[:p, :p] += weighted.flatten(1) @ centred.flatten(1).T
            total[:p, p:] += across
            total[p:, :p] += across.T
            total[p:, p:] += space.curvature(logits, probs, label=rows.label)
    return total
