"""What every method returns."""

from dataclasses import dataclass

from lightning_clamp.clamping.candidate import Candidate
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.passes import Logits


@dataclass(frozen=True)
class MethodOutcome:
    """A clamp, the logits it was fitted on, and how it got there."""

    clamp: Clamp
    logits: Logits
    reason: str
    candidates: tuple[Candidate, ...] = ()
    chosen: Candidate | None = None
    history: tuple[dict[str, float], ...] = ()
