"""The one criterion by which candidates are chosen: the expected held-out change, made pessimistic.

All figures are mean negative log-likelihoods in nats per row, as changes against temperature scaling alone; negative is
better.
"""

from typing import NamedTuple


class Estimate(NamedTuple):
    """What a candidate is expected to do on new data.

    Attributes:
        change: Akaike's estimate of the change of the held-out NLL; for dense outputs Takeuchi's, whose effective
            parameters count images rather than pixels.
        standard_error: Of that change, over draws of the calibration set.
    """

    change: float
    standard_error: float

    @property
    def criterion(self) -> float:
        """Expected change plus its standard error: below 0 it is more than over-fitting and chance explain."""
        return self.change + self.standard_error


def estimate(gain: float, effective_parameters: float, n_rows: int, standard_error: float) -> Estimate:
    """Estimate the held-out change of what was fitted.

    Args:
        gain: By how much it lowered the NLL of the calibration set.
        effective_parameters: What it was free to fit, beyond what it is compared with.
        n_rows: Rows of the calibration set.
        standard_error: Of the gain, over draws of the calibration set.

    Reference:
        Akaike, "A New Look at the Statistical Model Identification", 1974; Takeuchi, 1976; for the rule of one standard
        error Breiman, Friedman, Olshen and Stone, "Classification and Regression Trees", 1984, section 3.4.3.
    """
    return Estimate(effective_parameters / n_rows - gain, standard_error)
