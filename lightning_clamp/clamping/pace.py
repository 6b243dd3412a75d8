r"""How boldly the next step is taken, and what may follow it, from what the last one brought.

Along a step of Newton the model of the loss is a parabola: it falls by the promise. What was reached instead says how
the loss curves there. Sums of outer products mostly say that it curves more than it does, so that steps come out short.
"""

import math
from typing import NamedTuple

# How far a step has to keep its promise for the next to be less damped, and below which share it is to be more; by how
# much the damping then changes, and where it begins. And how far for the next to be near certain to help.
_KEPT, _BROKEN, _TRUSTED = 0.75, 0.25, 0.5
_FACTOR, _FIRST = 4.0, 0.25
# By how much a step is made longer, at most, where the one before brought more than it promised.
_LONGEST = 1.5
# What is to come after a fall, as a multiple of it: at least (each next fall is a quarter) and at most (two thirds).
_LEAST_MORE, _MOST_MORE = 1 / 3, 2.0


class Pace(NamedTuple):
    """How the next step is taken.

    Attributes:
        damping: So many times the coefficients' mean curvature is added to that of each of them (Marquardt, 1963).
        length: So many times the step is taken; the next is expected to curve as the last did.
        is_sure: Whether the next step is near certain to help.
    """

    damping: float = 0.0
    length: float = 1.0
    is_sure: bool = False

    def after(self, kept: float) -> "Pace":
        """After a step that kept such a share of its promise."""
        if kept < _BROKEN:
            return Pace(max(_FIRST, _FACTOR * self.damping))
        # The parabola through slope and fall has its minimum at 1 / (2 - kept) of the step. One longer step is enough:
        # nearer to the minimum the curvature is what it is taken for.
        length = min(1 / max(2 - kept, 1 / _LONGEST), _LONGEST if self.length <= 1 else 1.0)
        return Pace(self.damping / _FACTOR if kept > _KEPT else self.damping, length, kept > _TRUSTED)


def to_come(promise: float, fall: float) -> float:
    """What may follow a fall: what is left on the parabola, between two multiples of it."""
    curvature = 2 * promise - fall
    left = promise**2 / curvature - fall if curvature > 0 else math.inf
    return min(max(left, _LEAST_MORE * fall), _MOST_MORE * fall)
