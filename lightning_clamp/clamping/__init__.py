"""Neural Clamping and its relatives, in plain PyTorch: nothing here knows of Lightning."""

from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.fit import CalibrationResult, Solver, check_options, fit_clamp
from lightning_clamp.clamping.selection import Candidate

__all__ = ["CalibrationResult", "Candidate", "Clamp", "Solver", "check_options", "fit_clamp"]
