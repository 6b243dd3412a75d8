"""Train with PyTorch Lightning, and come out calibrated.

The public names load on first use, so that ``import lightning_clamp`` costs nothing and imports nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_clamp._lazy import load

__version__ = "0.2.0"

if TYPE_CHECKING:
    from lightning_clamp import losses as losses
    from lightning_clamp import metrics as metrics
    from lightning_clamp import sharpness as sharpness
    from lightning_clamp.callback import NeuralClamping as NeuralClamping
    from lightning_clamp.clamping import CalibrationResult as CalibrationResult
    from lightning_clamp.clamping import Clamp as Clamp
    from lightning_clamp.clamping import fit_clamp as fit_clamp
    from lightning_clamp.group_report import Groups as Groups
    from lightning_clamp.module import CalibrationModule as CalibrationModule
    from lightning_clamp.monitor import CalibrationMonitor as CalibrationMonitor
    from lightning_clamp.priors import ShiftedPriors as ShiftedPriors
    from lightning_clamp.priors import shifted_priors as shifted_priors
    from lightning_clamp.standalone import calibrate as calibrate

_HOME = {
    "CalibrationModule": "module",
    "CalibrationMonitor": "monitor",
    "CalibrationResult": "clamping",
    "Clamp": "clamping",
    "Groups": "group_report",
    "NeuralClamping": "callback",
    "ShiftedPriors": "priors",
    "calibrate": "standalone",
    "fit_clamp": "clamping",
    "shifted_priors": "priors",
}
_PACKAGES = ("losses", "metrics", "sharpness")

__all__ = [
    "CalibrationModule",
    "CalibrationMonitor",
    "CalibrationResult",
    "Clamp",
    "Groups",
    "NeuralClamping",
    "ShiftedPriors",
    "calibrate",
    "fit_clamp",
    "losses",
    "metrics",
    "sharpness",
    "shifted_priors",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name in _PACKAGES:
        return import_module(f"lightning_clamp.{name}")
    return load(__name__, name, _HOME)


def __dir__() -> list[str]:
    """List the public names before they are loaded."""
    return [*__all__, "__version__"]
