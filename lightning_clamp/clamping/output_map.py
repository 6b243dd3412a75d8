"""The output side: what is done to the logits, from the temperature alone to a matrix, and what shrinks it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_clamp._rows import MASKED, Rows
from lightning_clamp.clamping.moments import LogitMoments

OutputMap: TypeAlias = Literal["temperature", "bias", "vector", "beta", "matrix"]
OUTPUT_MAPS: tuple[OutputMap, ...] = ("temperature", "bias", "vector", "beta", "matrix")
# Numbers of a chunk of rows that are held at once: 128 MB in float64, and a few times that in what is made of them.
_MOST_ELEMENTS = 2**24


def n_parameters(kind: OutputMap, n_classes: int, n_labels: int = 0) -> int:
    """Parameters that matter, the temperature included; a common bias, or a common row of a matrix, changes nothing.

    Of labels each may have a scale and a bias.
    """
    if kind == "beta":
        return 3
    if n_labels:
        return {"temperature": 1, "bias": n_labels + 1, "vector": 2 * n_labels}[kind]
    counts = {"temperature": 1, "bias": n_classes, "vector": 2 * n_classes - 1, "matrix": n_classes**2 - 1}
    return counts[kind]


@dataclass(frozen=True)
class MapSpace:
    r"""The free parameters of an output map, and what shrinks them towards the temperature.

    .. math:: s z + D (z - c) + b

    with the common scale s = 1/T, deviations D (a diagonal for ``"vector"``, all entries for ``"matrix"``), biases b,
    and c the mean logit of every class: a number added to all logits changes nothing. A ridge of strength λ on the
    deviations, :math:`\tfrac{\lambda}{2}(v \sum_k D_{kk}^2 + (C - 1) v \sum_{j \ne k} D_{jk}^2 + \sum_k b_k^2)` with v
    the mean square of z - c, charges each by what it does to the logits; the C - 1 entries of a row beside the diagonal
    cost together what one on it does. The loss is convex in all of them. Scales may come out negative.

    A class that the data do not show keeps the common map: its row of D and its bias are 0, and those of the others
    have mean 0, so that all of them together are neither raised nor lowered against it.

    With a share ε of the uniform distribution the probabilities are :math:`(1 - ε) \mathrm{softmax} + ε / C`.

    Attributes:
        kind: Which deviations there are.
        n_classes: C.
        centre: c, ``(C,)``, float64.
        weight: What the ridge charges each free parameter, ``(q,)``: D row by row, b, and s, which is free (0).
        seen: Classes with a map of their own, ``(C,)``, bool; None for all.
        masked: Whether there are masked logits, which stay as they are.
        share: ε.
    """

    kind: OutputMap
    n_classes: int
    centre: Tensor
    weight: Tensor
    seen: Tensor | None = None
    masked: bool = False
    share: float = 0.0

    @property
    def n_free(self) -> int:
        """Parameters that nothing shrinks: the common scale, and the uniform share where there is one."""
        return 2 if self.share else 1

    def starting_at(self, temperature: float, share: float) -> "MapSpace":
        """The same space beside another temperature alone, with its uniform share."""
        return replace(self, share=share)

    def beside(self, logits: Tensor) -> "MapSpace":
        """The same space on the device of some logits: what is sent to a GPU has to wait for all it is at work on."""
        device = logits.device
        if device == self.centre.device:
            return self
        if device not in self._elsewhere:
            seen = None if self.seen is None else self.seen.to(device)
            self._elsewhere[device] = replace(self, centre=self.centre.to(device), seen=seen)
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, "MapSpace"]:
        """Copies on other devices."""
        return {}

    def temperature_only(self, temperature: float) -> Tensor:
        """The free parameters of a temperature alone."""
        free = torch.zeros_like(self.weight)
        free[-1] = 1 / temperature
        return free

    def widened(self, free: Tensor, narrower: "MapSpace") -> Tensor:
        """The free parameters of the same map in this space, from those of a kind that this one has in it."""
        if narrower.kind == self.kind:
            return free
        if narrower.kind == "temperature":
            return self.temperature_only(1 / float(free[-1]))
        n_own = self.n_classes if narrower.kind == "vector" else 0
        own, rest = free[:n_own], free[n_own:]
        if self.kind == "matrix" and n_own:
            own = own.diag().flatten()
        return torch.cat([own, own.new_zeros(len(self.weight) - len(own) - len(rest)), rest])

    def deviations(self, free: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """D, ``(C,)`` or ``(C, C)``, and b, ``(C,)``; None where the kind has none."""
        classes = self.n_classes
        if self.kind == "temperature":
            return None, None
        free = self._of_seen(free)
        own, bias = free[: -1 - classes], free[-1 - classes : -1]
        if self.kind == "bias":
            return None, bias
        return (own.reshape(classes, classes) if self.kind == "matrix" else own), bias

    def _of_seen(self, values: Tensor) -> Tensor:
        """Along the last axis, ``(..., q)``: 0 for classes that are not seen, mean 0 over those that are.

        Scales of the seen classes' own have mean 0 too, also on a matrix's diagonal: the common scale is theirs. This
        is an orthogonal projection, hence right for free parameters and for derivatives in them.
        """
        if self.seen is None or self.kind == "temperature":
            return values
        seen, classes = self.seen.to(values)[:, None], self.n_classes
        parts = []
        for part in torch.split(values, [len(self.weight) - 1 - classes, classes, 1], dim=-1)[:2]:
            by_class = part.reshape(*part.shape[:-1], classes, part.shape[-1] // classes)
            mean = (by_class * seen).sum(-2, keepdim=True) / seen.sum()
            by_class = (by_class - mean) * seen
            if by_class.shape[-1] == classes:
                same = seen.diagflat() - seen @ seen.T / seen.sum()
                share = (by_class * same).sum((-2, -1), keepdim=True) / (seen.sum() - 1)
                by_class = by_class - share * same
            parts.append(by_class.flatten(-2))
        return torch.cat([*parts, values[..., -1:]], -1)

    def is_usable(self, free: Tensor) -> bool:
        """Whether a map may be taken: where one scale is all there is, it has to be positive."""
        return self.kind != "bias" or float(free[-1]) > 0

    # The last argument of the next four is for labels alone, see .labels.
    def linear(self, change: Tensor, free: Tensor, label: Tensor | None = None) -> Tensor:
        """What the map makes of a change of the logits, ``(..., C)``."""
        free = free.to(change)
        own, _ = self.deviations(free)
        if own is None:
            return free[-1] * change
        if own.ndim == 1:
            return (own + free[-1]) * change
        return change @ self._whole(own, free[-1]).T

    @staticmethod
    def _whole(own: Tensor, common: Tensor) -> Tensor:
        """The matrix that logits are multiplied with, ``(C, C)``."""
        return own.diagonal_scatter(own.diagonal() + common)

    def pull_logits(self, logits: Tensor, slopes: Tensor, free: Tensor, label: Tensor | None = None) -> Tensor:
        """Derivatives in the logits, ``(M, C)``, from those in the mapped logits; 0 in masked ones."""
        if self.kind == "matrix":
            free = free.to(slopes)
            own, _ = self.deviations(free)
            assert own is not None
            pulled = slopes @ self._whole(own, free[-1])
        else:
            # Each class's logit depends on its own alone: the transpose is the map itself.
            pulled = self.linear(slopes, free, label)
        return pulled.where(logits > MASKED, 0.0)

    def offset(self, free: Tensor) -> Tensor:
        """What the map makes of logits that are all 0, ``(C,)``."""
        own, bias = self.deviations(free)
        if bias is None:
            return free.new_zeros(self.n_classes)
        if own is None:
            return bias
        centre = self.centre.to(own)
        return bias - (own @ centre if own.ndim == 2 else own * centre)

    def apply(self, logits: Tensor, free: Tensor, label: Tensor | None = None) -> Tensor:
        """The mapped logits of rows ``(M, C)``."""
        mapped = self._mapped(logits, free.to(logits))
        return mapped.where(logits > MASKED, logits) if self.masked else mapped

    def _mapped(self, logits: Tensor, free: Tensor) -> Tensor:
        own, bias = self.deviations(free)
        if bias is None:
            return free[-1] * logits
        offset = self.offset(free)
        if own is not None and own.ndim == 2:
            return torch.addmm(offset, logits, self._whole(own, free[-1]).T)
        return torch.addcmul(offset, logits, free[-1] if own is None else own + free[-1])

    def loss_of_label(self, log_probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss of every row, ``(M,)``; and the part of the label's probability that the softmax has, ``(M, 1)``.

        The latter is what the derivatives of a loss without the uniform share have to be multiplied by; None for 1.
        """
        own = log_probs.gather(1, target[:, None])
        if not self.share:
            return -own[:, 0], None
        own = own + math.log1p(-self.share)
        whole = own.logaddexp(own.new_tensor(math.log(self.share / self.n_classes)))
        return -whole[:, 0], (own - whole).exp()

    def pull(self, logits: Tensor, slopes: Tensor, label: Tensor | None = None) -> Tensor:
        """Derivatives in the free parameters, ``(q,)``, from those in the mapped logits, ``(M, C)``, over all rows."""
        if self.kind == "matrix":
            sums, product = slopes.sum(0), slopes.T @ logits
            own = product - sums[:, None] * self.centre.to(logits)
            return self._of_seen(torch.cat([own.flatten(), sums, product.trace().reshape(1)]))
        product = (slopes * logits).sum(0)
        common = product.sum().reshape(1)
        if self.kind == "temperature":
            return common
        sums = slopes.sum(0)
        scales = [product - sums * self.centre.to(logits)] if self.kind == "vector" else []
        return self._of_seen(torch.cat([*scales, sums, common]))

    def pull_per_item(self, rows: Rows, slopes: Tensor) -> Tensor:
        """The same per item, ``(n_items, q)``."""
        total = slopes.new_zeros(rows.n_items, len(self.weight))
        for part in self._chunks(len(slopes)):
            total.index_add_(0, rows.item[part], self._columns(rows.logits[part], slopes[part]))
        return self._of_seen(total)

    def curvature(
        self, logits: Tensor, probs: Tensor, weight: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """Curvature of the summed loss of rows ``(M, C)``, ``(q, q)``, each counted ``weight`` ``(M, 1)`` times."""
        total = logits.new_zeros(len(self.weight), len(self.weight))
        for part in self._chunks(len(logits)):
            weighted = probs[part] if weight is None else probs[part] * weight[part]
            spread = self._columns(logits[part], probs[part])
            counted = spread if weight is None else spread * weight[part]
            total += self._expected_square(logits[part], weighted) - counted.T @ spread
        return self._of_seen(self._of_seen(total).T)

    @property
    def n_own(self) -> int:
        """Free parameters that only one class's logit depends on; a matrix's are not told apart by class."""
        return {"temperature": 0, "bias": 1, "vector": 2}.get(self.kind, 0)

    def by_class(self, values: Tensor) -> Tensor:
        """Those of each class out of ``(..., q)``: ``(..., C, m)``."""
        return values[..., :-1].reshape(*values.shape[:-1], self.n_own, self.n_classes).mT

    def joined(self, own: Tensor, common: Tensor) -> Tensor:
        """The free parameters, or derivatives in them, of classes, ``(C, m)``, and of the common scale."""
        return self._of_seen(torch.cat([own.T.flatten(), common.reshape(1)]))

    def _chunks(self, n_rows: int) -> Iterator[slice]:
        """Rows of which each has a number per free parameter, so many at once."""
        size = max(1, _MOST_ELEMENTS // len(self.weight))
        return (slice(first, first + size) for first in range(0, n_rows, size))

    def _columns(self, logits: Tensor, slopes: Tensor) -> Tensor:
        """Each row's derivatives in the free parameters, ``(M, q)``."""
        common = (slopes * logits).sum(1, keepdim=True)
        if self.kind == "temperature":
            return common
        if self.kind == "bias":
            return torch.cat([slopes, common], 1)
        centred = logits - self.centre.to(logits)
        if self.kind == "vector":
            return torch.cat([slopes * centred, slopes, common], 1)
        outer = slopes[:, :, None] * centred[:, None, :]
        return torch.cat([outer.flatten(1), slopes, common], 1)

    def _expected_square(self, logits: Tensor, probs: Tensor) -> Tensor:
        """Sum over rows of the expected outer product of the derivatives of one class's logit, ``(q, q)``.

        A class's logit depends on its own row of D and its own bias alone: blocks, class by class, and the border of s.
        """
        corner = (probs * logits**2).sum().reshape(1, 1)
        if self.kind == "temperature":
            return corner
        order = self._order(logits.device)
        blocks, border = self._own_squares(logits, probs)
        square = logits.new_zeros(len(self.weight), len(self.weight))
        square[order[:, :, None], order[:, None, :]] = blocks
        square[order, -1] = square[-1, order] = border
        square[-1, -1] = corner[0, 0]
        return square

    def _own_squares(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Of each class's row of D and bias: the sums of the outer products, ``(C, m, m)``, and those with s."""
        centred = logits - self.centre.to(logits)
        if self.kind == "matrix":
            inputs = torch.cat([centred, torch.ones_like(logits[:, :1])], 1)
            blocks = (probs.T[:, None] * inputs.T) @ inputs
            return blocks, (probs * logits).T @ inputs
        of_bias, with_bias = probs.sum(0), (probs * logits).sum(0)
        if self.kind == "bias":
            return of_bias[:, None, None], with_bias[:, None]
        first = probs * centred
        mixed = first.sum(0)
        blocks = torch.stack([(first * centred).sum(0), mixed, mixed, of_bias], 1).reshape(-1, 2, 2)
        return blocks, torch.stack([(first * logits).sum(0), with_bias], 1)

    def _order(self, device: torch.device) -> Tensor:
        """Which free parameters class k's logit depends on: its row of D, and its bias, ``(C, m)``."""
        classes = self.n_classes
        count = len(self.weight) - 1
        bias = torch.arange(count - classes, count, device=device)[:, None]
        return torch.cat([torch.arange(count - classes, device=device).reshape(classes, -1), bias], 1)


def temperature_space(n_classes: int, *, share: float = 0.0) -> MapSpace:
    """The space of the temperature alone."""
    return MapSpace("temperature", n_classes, torch.zeros(0), torch.zeros(1, dtype=torch.float64), share=share)


def map_space(kind: OutputMap, moments: LogitMoments, repeats: float = 1.0) -> MapSpace:
    """The space of one kind of output map, for given logits.

    Args:
        kind: Which.
        moments: Of the logits.
        repeats: How many rows say what one independent row would (the design effect of correlated pixels): the ridge
            is as many times stronger, so that it shrinks as it would that one.
    """
    n_classes = len(moments.counts)
    if kind == "temperature":
        return temperature_space(n_classes)
    weight = torch.cat([repeats * _charges(kind, n_classes, moments.square), torch.zeros(1, dtype=torch.float64)])
    seen = None if bool(moments.seen.all()) else moments.seen
    return MapSpace(kind, n_classes, moments.centre, weight, seen, moments.masked)


def _charges(kind: OutputMap, n_classes: int, square: float) -> Tensor:
    """What the ridge charges the deviations and the biases, float64."""
    bias = torch.ones(n_classes, dtype=torch.float64)
    if kind == "bias":
        return bias
    if kind == "vector":
        return torch.cat([square * bias, bias])
    entries = (n_classes - 1) * torch.ones(n_classes, n_classes, dtype=torch.float64)
    return torch.cat([square * entries.fill_diagonal_(1.0).flatten(), bias])
