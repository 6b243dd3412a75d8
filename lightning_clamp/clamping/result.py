"""What a calibration did, and the plain values it is saved as."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from lightning_clamp.clamping.candidate import Candidate
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.metrics.bootstrap import Interval
from lightning_clamp.metrics.reliability import ReliabilityCurve

Method: TypeAlias = Literal["clamp", "published", "temperature"]


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration did.

    Attributes:
        clamp: The fitted clamp: ``clamp.scale(network(clamp.perturb(x)))`` are calibrated logits.
        method: The method that was run.
        before: ``nll`` (nats per row), ``ece`` and ``accuracy`` (fractions) on the calibration set, uncalibrated.
        after: The same with the clamp.
        change: After minus before of the same, each with its 95 % interval (paired bootstrap over samples). The clamp
            was fitted to these samples, which flatters it by about (effective parameters) / n in the NLL.
        reliability: Reliability curves before and after.
        candidates: Everything that was considered (method ``"clamp"`` only). Of those that were not chosen, a result
            that was saved or came from another process has no clamps.
        chosen: The candidate that was chosen, among them.
        reason: What was chosen and why, in words.
        history: NLL and temperature pass by pass, or loss and temperature epoch by epoch.
        n_samples: Size of the calibration set.
        passes: Passes over the calibration set, forward only or with a backward to the input.
        seconds: Time taken, reading the data included.
    """

    clamp: Clamp
    method: Method
    before: Mapping[str, float]
    after: Mapping[str, float]
    change: Mapping[str, Interval]
    reliability: tuple[ReliabilityCurve, ReliabilityCurve]
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    reason: str
    history: tuple[dict[str, float], ...]
    n_samples: int
    passes: int
    seconds: float

    def to_state(self) -> dict[str, Any]:
        """Numbers, strings and tensors on the CPU, which ``torch.load(weights_only=True)`` reads."""
        return {
            **_fields_of(self),
            "clamp": {name: tensor.cpu() for name, tensor in self.clamp.state_dict().items()},
            "before": dict(self.before),
            "after": dict(self.after),
            "change": {name: tuple(interval) for name, interval in self.change.items()},
            "reliability": [tuple(part.cpu() for part in curve) for curve in self.reliability],
            # Each clamp may hold an image.
            "candidates": [_fields_of(replace(candidate, clamp=None)) for candidate in self.candidates],
            "chosen": None if self.chosen is None else self.candidates.index(self.chosen),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "CalibrationResult":
        """The inverse of :meth:`to_state`."""
        clamp, chosen = Clamp.from_state(state["clamp"]), state["chosen"]
        before, after = (ReliabilityCurve(*curve) for curve in state["reliability"])
        candidates = [
            Candidate(**{**record, "clamp": clamp if index == chosen else None})
            for index, record in enumerate(state["candidates"])
        ]
        rebuilt = {
            "clamp": clamp,
            "change": {name: Interval(*interval) for name, interval in state["change"].items()},
            "reliability": (before, after),
            "candidates": tuple(candidates),
            "chosen": None if chosen is None else candidates[chosen],
        }
        return cls(**{**state, **rebuilt})


def _fields_of(record: CalibrationResult | Candidate) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}
