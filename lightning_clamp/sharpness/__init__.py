"""How sharp the minimum is that a network trains into: the number, and a callback that follows it in training.

:func:`gauss_newton_sharpness` needs no Lightning; the callback loads on first use.
"""

from typing import TYPE_CHECKING, Any

from lightning_clamp._lazy import load
from lightning_clamp.sharpness.gauss_newton import gauss_newton_sharpness

if TYPE_CHECKING:
    from lightning_clamp.sharpness.monitor import SharpnessMonitor

__all__ = ["SharpnessMonitor", "gauss_newton_sharpness"]

_HOME = {"SharpnessMonitor": "monitor"}


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    return load(__name__, name, _HOME)


def __dir__() -> list[str]:
    """List the public names before they are loaded."""
    return [*__all__]
