"""Neural Clamping and its relatives, in plain PyTorch: nothing here knows of Lightning."""

from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.fit import CalibrationResult, Solver, check_options, fit_clamp
from lightning_clamp.clamping.frozen import kept_random_state
from lightning_clamp.clamping.passes import as_pair
from lightning_clamp.clamping.ranks import ALONE, Ranks
from lightning_clamp.clamping.selection import Candidate
from lightning_clamp.clamping.survey import MIN_SAMPLES

__all__ = [
    "ALONE",
    "MIN_SAMPLES",
    "CalibrationResult",
    "Candidate",
    "Clamp",
    "Ranks",
    "Solver",
    "as_pair",
    "check_options",
    "fit_clamp",
    "kept_random_state",
]
