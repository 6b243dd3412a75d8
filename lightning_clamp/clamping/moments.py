"""What one pass over given logits tells before an output map is fitted to them: their spread, and which classes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_clamp._rows import MASKED, Rows, softmax
from lightning_clamp.clamping.passes import RowSource, summed

# Fewer samples of a class say next to nothing of it, where the network expects this many times as many.
_FEW = 5
_TIMES_EXPECTED = 20
# Samples that a network has to expect of a class, for their absence not to be by chance (one in e^10); of many classes
# together, above what chance leaves out of them.
NOT_BY_CHANCE = 10
_MOST_NAMED = 5


class LogitMoments(NamedTuple):
    """Sums over rows of logits; masked logits take no part.

    Attributes:
        centre: Mean logit of every class, ``(C,)``, float64.
        square: Mean square about it, over all classes.
        counts: Independent samples of every class, ``(C,)``.
        expected: How many the network expects, at the temperature, ``(C,)``.
        masked: Whether any logit is masked.
    """

    centre: Tensor
    square: float
    counts: Tensor
    expected: Tensor
    masked: bool

    @property
    def few(self) -> Tensor:
        """Where there are too few samples to say anything, or none, shape of the counts, bool."""
        return (self.counts < _FEW) & (self.expected > _TIMES_EXPECTED * self.counts)

    @property
    def seen(self) -> Tensor:
        """Classes of which the labels show enough to tell them from the others, ``(C,)``, bool.

        A class without samples is one of them where chance explains that none was drawn.
        """
        absent = self.counts == 0
        if self._absence_is_by_chance:
            absent = absent & (self.expected > NOT_BY_CHANCE)
        return ~absent & ~(self.few & (self.counts > 0))

    @property
    def _absence_is_by_chance(self) -> bool:
        """Whether the classes without samples are together no more than what is left out by chance (Poisson)."""
        chance = (-self.expected).exp()
        mean = (self.expected * chance).sum()
        variance = (self.expected**2 * chance * (1 - chance)).sum()
        return bool(self.expected[self.counts == 0].sum() <= mean + 3 * variance.sqrt() + NOT_BY_CHANCE)

    @property
    def is_one_class(self) -> bool:
        """Whether all labels are the same."""
        return int((self.counts > 0).sum()) == 1

    @property
    def are_missing(self) -> bool:
        """Whether classes are not seen that the network expects, which chance does not explain: a sorted set, say."""
        return not bool(self.seen.all())

    @property
    def unseen_words(self) -> str:
        """Names of the classes that are not seen."""
        unseen: Sequence[int] = (~self.seen).nonzero()[:, 0].tolist()
        names = ", ".join(map(str, unseen[:_MOST_NAMED])) + (", …" if len(unseen) > _MOST_NAMED else "")
        thing, things = self._names
        return f"{thing} {names}" if len(unseen) == 1 else f"{len(unseen)} of {len(self.counts)} {things} ({names})"

    @property
    def warning_of_unseen(self) -> str:
        """What there is to say of them."""
        return (
            f"The calibration set has no samples, or next to none, of {self.unseen_words}: what is fitted class by "
            "class leaves them as they are, and nothing that is said of new data counts them; draw the set at random "
            "from all classes."
        )

    @property
    def _names(self) -> tuple[str, str]:
        return "class", "classes"


def logit_moments(rows: RowSource, n_classes: int, temperature: float = 1.0, repeats: float = 1.0) -> LogitMoments:
    """Moments of rows of logits.

    Args:
        rows: Rows of logits.
        n_classes: C.
        temperature: At which the network's expectations are taken.
        repeats: How many rows say what one independent row would (the design effect of correlated pixels).
    """

    def first_sums(batch: Rows) -> tuple[Tensor, ...]:
        present = batch.logits > MASKED
        counts = torch.bincount(batch.target, minlength=n_classes)
        expected = softmax(batch.logits / temperature).sum(0)
        return (batch.logits * present).sum(0), present.sum(0), counts, expected

    def square_sums(batch: Rows) -> tuple[Tensor, ...]:
        about = (batch.logits - centre.to(batch.logits)) * (batch.logits > MASKED)
        return ((about**2).sum(),)

    shapes = [(n_classes,)] * 4
    total, present, counts, expected = summed((first_sums(batch) for batch in rows), shapes, rows.ranks)
    centre = total / present.clamp_min(1)
    (square,) = summed((square_sums(batch) for batch in rows), [()], rows.ranks)
    return LogitMoments(
        centre=centre,
        square=max(float(square / present.sum()), torch.finfo(torch.float64).tiny),
        counts=counts / repeats,
        expected=expected / repeats,
        masked=bool(present.sum() < counts.sum() * n_classes),
    )
