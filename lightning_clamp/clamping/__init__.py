"""Neural Clamping and its relatives, in plain PyTorch: nothing here knows of Lightning."""

from lightning_clamp.clamping.candidate import Candidate
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.fit import fit_clamp
from lightning_clamp.clamping.options import ClampOptions, PublishedOptions
from lightning_clamp.clamping.result import CalibrationResult

__all__ = ["CalibrationResult", "Candidate", "Clamp", "ClampOptions", "PublishedOptions", "fit_clamp"]
