"""What tests of calibration have found, as numbers and in words."""

import math
from typing import NamedTuple

from torch import Tensor

# Classes that a sentence names.
_MOST_NAMED = 3


class CalibrationEvidence(NamedTuple):
    """Evidence against "the probabilities are calibrated"; see :func:`~.score_test.calibration_test`.

    All are float64 tensors, nan where there are too few rows to say.

    Attributes:
        n_samples: Items (images, also of dense outputs) with a row that was scored.
        p_temperature: p-value of "no other temperature is better".
        p_spiegelhalter: p-value of "the Brier score is what the probabilities expect".
        p_classes: Shape ``(C,)``, p-value of "this class is as frequent as its probabilities say", after Holm's
            correction for C classes.
        temperature: The temperature that would be best for the logits as they are, 1 if nothing is to be changed; from
            1/4 to 4, beyond which it stays at these ends.
        brier_excess: Mean Brier score minus the one that the probabilities expect; above 0 they are too sure.
        class_excess: Shape ``(C,)``, rows of each class minus those that its probabilities expect.
    """

    n_samples: Tensor
    p_temperature: Tensor
    p_spiegelhalter: Tensor
    p_classes: Tensor
    temperature: Tensor
    brier_excess: Tensor
    class_excess: Tensor

    @property
    def p(self) -> float:
        """The p-value of all together: the smallest of the three, times three; nan if none could say anything."""
        known = self._known()
        return min(1.0, len(known) * min(known.values())) if known else float("nan")

    def scalars(self) -> dict[str, float]:
        """``p``, ``p_temperature``, ``p_spiegelhalter`` and the smallest ``p_classes``, without those that are nan."""
        known = self._known()
        return {**({"p": self.p} if known else {}), **{f"p_{name}": value for name, value in known.items()}}

    def describe(self, *, temperature: float = 1.0, level: float = 0.01, subject: str = "the probabilities are") -> str:
        """One sentence: what is off, and what would be right; or that nothing was found.

        Args:
            temperature: The one by which the logits were divided already.
            level: Largest p-value at which something is called off.
            subject: What is off, with its verb.
        """
        n = f"{int(self.n_samples):,} samples"
        known = self._known()
        if not known:
            return f"These {n} are too few to say whether the probabilities are calibrated."
        if self.p >= level:
            said = p_in_words(self.p)
            return f"Nothing speaks against it on these {n}: as far as they tell, {subject} calibrated ({said})."
        off = {name for name, p in known.items() if len(known) * p < level}
        found = []
        if "temperature" in off:
            found.append(f"T would be {self._better(temperature)} instead of {temperature:.2f}")
        if "classes" in off:
            found.append(self._classes(level / len(known)))
        if not found:
            words = "higher" if float(self.brier_excess) > 0 else "lower"
            found.append(f"the Brier score is {words} by {abs(float(self.brier_excess)):.2g} than they expect")
        return f"On these {n} {subject} off: {'; '.join(found)}; {p_in_words(self.p)}; calibrate again."

    def _known(self) -> dict[str, float]:
        smallest = self.p_classes[~self.p_classes.isnan()]
        values = {"temperature": float(self.p_temperature), "spiegelhalter": float(self.p_spiegelhalter)}
        if len(smallest):
            values["classes"] = float(smallest.min())
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def _better(self, temperature: float) -> str:
        factor = float(self.temperature)
        bound = {4.0: "at least ", 0.25: "at most "}.get(round(factor, 6), "")
        return f"{bound}{factor * temperature:.2f}"

    def _classes(self, level: float) -> str:
        """The classes that are off, most certain first."""
        order = [k for k in self.p_classes.nan_to_num(2).argsort(stable=True).tolist() if self.p_classes[k] < level]
        more = f" and {len(order) - _MOST_NAMED} more" if len(order) > _MOST_NAMED else ""
        named = [f"class {k} ({float(self.class_excess[k]):+.0f})" for k in order[:_MOST_NAMED]]
        return f"more or fewer rows than the probabilities say are of {', '.join(named)}{more}"


def p_in_words(value: float) -> str:
    """A p-value, as one writes it."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
