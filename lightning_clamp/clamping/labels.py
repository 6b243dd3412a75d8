r"""Several labels per item, each yes or no: a scale and a bias for every label, shrunk towards those of all.

Rows are those of :mod:`lightning_clamp._rows`: one for each label of an item, with the columns (0, z) and the number of
the label. Labels share nothing but the common scale and bias, so the loss curves in blocks, one for each label; all
that derivatives need of the rows of a label are their sums of 1, z and z².
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_clamp._rows import MASKED, Rows, softmax
from lightning_clamp.clamping.moments import NOT_BY_CHANCE, LogitMoments
from lightning_clamp.clamping.output_map import MapSpace, OutputMap
from lightning_clamp.clamping.passes import RowSource, summed


class LabelMoments(LogitMoments):
    """:class:`~.moments.LogitMoments` of labels: ``(K,)`` in place of ``(C,)``, counts and expected ``(K, 2)``."""

    __slots__ = ()

    @property
    def seen(self) -> Tensor:
        """Labels of which the set shows enough items with them and without them, ``(K,)``, bool."""
        return self._told.all(1)

    @property
    def are_missing(self) -> bool:
        """Whether items with a label, or without it, are missing, which chance does not explain."""
        return bool((~self._told & (self.expected > NOT_BY_CHANCE)).any())

    @property
    def _told(self) -> Tensor:
        return (self.counts > 0) & ~self.few

    @property
    def is_one_class(self) -> bool:
        """Whether every label is always there, or never."""
        return not bool((self.counts > 0).all(1).any())

    @property
    def warning_of_unseen(self) -> str:
        """What there is to say of labels that are not seen."""
        return (
            f"The calibration set has no samples with or none without {self.unseen_words}, or next to none: what is "
            "fitted label by label leaves them at what fits all labels, and nothing that is said of new data counts "
            "them; take more data."
        )

    @property
    def _names(self) -> tuple[str, str]:
        return "label", "labels"


def label_moments(rows: RowSource, n_labels: int, temperature: float = 1.0, repeats: float = 1.0) -> LabelMoments:
    """Moments of rows of labels.

    Args:
        rows: Rows of logits.
        n_labels: K.
        temperature: At which the network's expectations are taken.
        repeats: How many rows of a label say what one independent row would.
    """

    def first_sums(batch: Rows) -> tuple[Tensor, ...]:
        z, present = batch.logits[:, 1], batch.logits[:, 1] > MASKED
        expected = (z / temperature).sigmoid()
        values = torch.stack([z * present, present, 1 - batch.target, batch.target, 1 - expected, expected], 1)
        return (_by_label(values, batch.label, n_labels),)

    def square_sums(batch: Rows) -> tuple[Tensor, ...]:
        z = batch.logits[:, 1]
        return ((((z - centre.to(z)[batch.label]) * (z > MASKED)) ** 2).sum(),)

    (sums,) = summed((first_sums(batch) for batch in rows), [(n_labels, 6)], rows.ranks)
    total, present = sums[:, 0], sums[:, 1]
    centre = total / present.clamp_min(1)
    (square,) = summed((square_sums(batch) for batch in rows), [()], rows.ranks)
    return LabelMoments(
        centre=centre,
        square=max(float(square / present.sum()), torch.finfo(torch.float64).tiny),
        counts=sums[:, 2:4] / repeats,
        expected=sums[:, 4:6] / repeats,
        masked=bool(present.sum() < sums[:, 2:4].sum()),
    )


@dataclass(frozen=True)
class LabelSpace(MapSpace):
    r"""The free parameters of an output map of K labels, and what shrinks them.

    .. math:: (s + d_k) z_k + b + b_k - d_k c_k

    with the common scale s = 1/T and bias b, which are free, the label's deviations d_k (for ``"vector"``) and b_k, and
    its mean logit c_k. The ridge is that of the vector map of classes, :math:`\tfrac{\lambda}{2} \sum_k (v d_k^2 +
    b_k^2)` with v the mean square of z - c.

    A label that the data do not show gets the common map and takes no part in its fit: of rows that are all alike, the
    surest would be the best. In the loss it stays at the temperature alone.

    Attributes:
        kind: ``"bias"`` or ``"vector"``.
        n_classes: 2, the columns of a row.
        centre: c, ``(K,)``, float64.
        weight: What the ridge charges d, b_1 to b_K, b and s; the last two are free (0).
        seen: Labels with a map of their own, ``(K,)``, bool; None for all.
        scale: 1/T of the temperature alone.
        repeats: How many rows of a label say what one independent row would (the design effect of correlated pixels).
    """

    scale: float = 1.0
    repeats: float = 1.0

    def starting_at(self, temperature: float, share: float) -> "LabelSpace":
        """The same space beside another temperature alone."""
        return replace(self, scale=1 / temperature)

    @property
    def features(self) -> Tensor:
        """Derivatives of a label's logit in its d and b, as coefficients of 1 and z, ``(K, m, 2)``."""
        one, zero = torch.ones_like(self.centre), torch.zeros_like(self.centre)
        rows = [torch.stack([-self.centre, one], 1)] if self.kind == "vector" else []
        return torch.stack([*rows, torch.stack([one, zero], 1)], 1)

    @property
    def part(self) -> Tensor:
        """1 for labels that take part in the fit, 0 for the others, ``(K,)``."""
        return torch.ones_like(self.centre) if self.seen is None else self.seen.to(self.centre)

    def own(self, free: Tensor) -> Tensor:
        """Each label's d and b, or derivatives in them, ``(K, m)``."""
        return free[:-2].reshape(-1, len(self.centre)).T

    def free(self, own: Tensor, common: Tensor) -> Tensor:
        """The inverse of :meth:`own`, ``(..., q)`` from ``(..., K, m)`` and common bias and scale ``(..., 2)``."""
        return torch.cat([own.mT.flatten(-2), common], -1)

    def deviations(self, free: Tensor) -> tuple[Tensor | None, Tensor]:
        """d, ``(K,)`` or None, and the labels' biases with the common one, ``(K,)``."""
        own = self.own(free) * self.part.to(free)[:, None]
        return (own[:, 0] if self.kind == "vector" else None), own[:, -1] + free[-2]

    def linear(self, change: Tensor, free: Tensor, label: Tensor | None = None) -> Tensor:
        """What the map makes of a change of the rows' logits, ``(M, 2)``."""
        own, _ = self.deviations(free)
        scale = free[-1].expand(len(self.centre)) if own is None else own + free[-1]
        return change * scale.where(self.part > 0, self.scale).to(change)[label][:, None]

    def apply(self, logits: Tensor, free: Tensor, label: Tensor | None = None) -> Tensor:
        """The mapped logits of rows ``(M, 2)``."""
        mapped = self.linear(logits, free, label)
        mapped[:, 1] += (self.offset(free) * self.part).to(logits)[label]
        return mapped.where(logits > MASKED, logits) if self.masked else mapped

    def pull(self, logits: Tensor, slopes: Tensor, label: Tensor | None = None) -> Tensor:
        """Derivatives in the free parameters, ``(q,)``, from those in the mapped logits, ``(M, 2)``, over all rows."""
        return self._of_sums(_by_label(_with_logit(slopes[:, 1], logits), label, len(self.centre)))

    def pull_per_item(self, rows: Rows, slopes: Tensor) -> Tensor:
        """The same per item, ``(n_items, q)``."""
        assert rows.label is not None
        n_labels = len(self.centre)
        values = _with_logit(slopes[:, 1], rows.logits)
        sums = _by_label(values, rows.item * n_labels + rows.label, rows.n_items * n_labels)
        return self._of_sums(sums.reshape(rows.n_items, n_labels, 2))

    def blocks(self, rows: Rows, free: Tensor) -> Tensor:
        """Curvature of the summed loss in each label's offset and factor of z, ``(K, 2, 2)``."""
        return self._blocks(rows.logits, softmax(self.apply(rows.logits, free, rows.label)), rows.label)

    def curvature(
        self, logits: Tensor, probs: Tensor, weight: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """Curvature of the summed loss of rows ``(M, 2)``, ``(q, q)``."""
        assert weight is None  # no uniform share
        blocks, n_labels = self._blocks(logits, probs, label), len(self.centre)
        each = self._of_sums(torch.eye(2 * n_labels).to(blocks).reshape(-1, n_labels, 2))
        return each.T @ (blocks @ each.reshape(n_labels, 2, -1)).reshape(2 * n_labels, -1)

    def _blocks(self, logits: Tensor, probs: Tensor, label: Tensor | None) -> Tensor:
        z, variance = logits[:, 1], probs[:, 0] * probs[:, 1]
        first = variance * z
        sums = _by_label(torch.stack([variance, first, first, first * z], 1), label, len(self.centre))
        return sums.reshape(-1, 2, 2) * self.part.to(sums)[:, None, None]

    def _of_sums(self, sums: Tensor) -> Tensor:
        """Derivatives ``(..., q)`` from those in every label's offset and factor of z, ``(..., K, 2)``."""
        sums = sums * self.part.to(sums)[:, None]
        own = (self.features.to(sums) @ sums[..., None])[..., 0]
        return self.free(own, sums.sum(-2))


def label_space(kind: OutputMap, moments: LabelMoments, temperature: float = 1.0, repeats: float = 1.0) -> LabelSpace:
    """The space of one kind of output map of labels.

    Args:
        kind: Which, no matrix.
        moments: Of the logits.
        temperature: That alone.
        repeats: See :class:`LabelSpace`; the ridge is as many times stronger.
    """
    bias = torch.ones_like(moments.centre)
    charges = torch.cat([*([moments.square * bias] if kind == "vector" else []), bias])
    weight = torch.cat([repeats * charges, torch.zeros(2, dtype=torch.float64)])
    seen = None if bool(moments.seen.all()) else moments.seen
    return LabelSpace(kind, 2, moments.centre, weight, seen, moments.masked, scale=1 / temperature, repeats=repeats)


def repeats_within(rows: RowSource, n_labels: int, temperature: float) -> float:
    """How many rows of one label in an item (pixels) say what one independent row would, on average."""

    def misses(batch: Rows) -> Tensor:
        return (batch.logits[:, 1:] / temperature).sigmoid() - batch.target[:, None]

    def first_sums(batch: Rows) -> tuple[Tensor, ...]:
        miss = misses(batch)
        return (_by_label(torch.cat([miss, torch.ones_like(miss)], 1), batch.label, n_labels),)

    def square_sums(batch: Rows) -> tuple[Tensor, ...]:
        assert batch.label is not None
        about = misses(batch) - mean.to(batch.logits)[batch.label][:, None]
        together = _by_label(about, batch.item * n_labels + batch.label, batch.n_items * n_labels)
        return (together**2).sum(), (about**2).sum()

    (sums,) = summed((first_sums(batch) for batch in rows), [(n_labels, 2)], rows.ranks)
    mean = sums[:, 0] / sums[:, 1].clamp_min(1)
    together, alone = summed((square_sums(batch) for batch in rows), [(), ()], rows.ranks)
    return float(together / alone)


def _with_logit(values: Tensor, logits: Tensor) -> Tensor:
    """A value of each row, and the value times its logit, ``(M, 2)``."""
    return torch.stack([values, values * logits[:, 1]], 1)


def _by_label(values: Tensor, label: Tensor | None, n_labels: int) -> Tensor:
    """Sums of values ``(M, n)`` over the rows of each label, ``(n_labels, n)``."""
    assert label is not None
    return values.new_zeros(n_labels, values.shape[1]).index_add(0, label, values)
