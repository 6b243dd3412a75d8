"""What a calibration did, and the plain values it is saved as."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lightning_clamp._checks import counted
from lightning_clamp.clamping.by_label import LabelMetrics
from lightning_clamp.clamping.candidate import Candidate, Refusal
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.options import Method
from lightning_clamp.metrics.bootstrap import Interval
from lightning_clamp.metrics.reliability import ReliabilityCurve
from lightning_clamp.spec import Spec


@dataclass(frozen=True, repr=False)
class CalibrationResult:
    """What a calibration did; printed, it is a table of the metrics before and after.

    Attributes:
        clamp: The fitted clamp: ``clamp.scale(network(clamp.perturb(x)))`` are calibrated logits. With ``spec.views``
            the network's logits are first averaged over them: :class:`~lightning_clamp.CalibrationModule` does so.
        method: The method that was run.
        spec: How batches were read, how the network was called and what the outputs mean; without ``views`` where the
            network was left as it is.
        before: ``nll`` (nats per row), ``ece`` and ``accuracy`` (fractions) on the calibration set, uncalibrated; of
            several labels the means over those labels of which something is known.
        after: The same with the clamp.
        change: After minus before of the same, each with its 95 % interval (paired bootstrap over samples). The clamp
            was fitted to these samples, which flatters it by about (effective parameters) / n in the NLL.
        reliability: Reliability curves before and after; of several labels those of all entries.
        candidates: Everything that was considered (method ``"clamp"`` only). Of those that were not chosen, a result
            that was saved or came from another process has no clamps.
        chosen: The candidate that was chosen, among them.
        reason: What was chosen and why, in words.
        history: NLL and temperature pass by pass, or loss and temperature epoch by epoch.
        n_samples: Size of the calibration set.
        passes: Passes over the calibration set, forward only or with a backward to the input; the network is called
            ``spec.n_views`` times for every batch.
        seconds: Time taken, reading the data included.
        fingerprint: Of the weights that it belongs to, where a Trainer ran it: a digest of all parameters and
            buffers; empty elsewhere.
        by_label: The metrics of each of several labels; None for other tasks.
    """

    clamp: Clamp
    method: Method
    spec: Spec
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
    fingerprint: str = ""
    by_label: LabelMetrics | None = None

    @property
    def chosen_name(self) -> str:
        """What is applied, in a word or two: ``"identity"``, ``"vector"``, ``"2×2 grid + temperature"``."""
        if self.clamp.is_identity:
            return "identity"
        return self.method if self.chosen is None else self.chosen.name

    def __repr__(self) -> str:
        """A few lines of text: the metrics before and after, and what was chosen and why."""
        lines = [f"{'calibration set':<16}{'before':>10}{'after':>10}    change [95 % interval]"]
        for name, form in (("nll", ".4f"), ("ece", ".2%"), ("accuracy", ".2%")):
            change, low, high = (f"{number:+{form}}" for number in self.change[name])
            row = f"{name:<16}{self.before[name]:>10{form}}{self.after[name]:>10{form}}"
            lines.append(f"{row}    {change} [{low}, {high}]")
        passes = counted(self.passes, "pass", "passes")
        if self.spec.views:
            passes += f" of {self.spec.n_views} views"
        lines.append(
            f"T = {float(self.clamp.temperature):.4g}, |δ| = {self.clamp.perturbation_norm:.3g}, "
            f"{counted(self.n_samples, 'sample')}, {passes}, {self.seconds:.1f} s"
        )
        lines.append(f"chosen: {self.reason}")
        if self.by_label is not None:
            lines += [f"above: means over {counted(len(self.by_label.entries), 'label')}", repr(self.by_label)]
        return "\n".join(lines)

    def to_state(self) -> dict[str, Any]:
        """Numbers, strings and tensors on the CPU, which ``torch.load(weights_only=True)`` reads."""
        return {
            **_fields_of(self),
            "spec": _fields_of(self.spec),
            "clamp": {name: tensor.cpu() for name, tensor in self.clamp.state_dict().items()},
            "before": dict(self.before),
            "after": dict(self.after),
            "change": {name: tuple(interval) for name, interval in self.change.items()},
            "reliability": [tuple(part.cpu() for part in curve) for curve in self.reliability],
            "candidates": [_state_of(candidate) for candidate in self.candidates],
            "chosen": None if self.chosen is None else self.candidates.index(self.chosen),
            "by_label": None if self.by_label is None else self.by_label.to_state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "CalibrationResult":
        """The inverse of :meth:`to_state`."""
        clamp, chosen = Clamp.from_state(state["clamp"]), state["chosen"]
        before, after = (ReliabilityCurve(*curve) for curve in state["reliability"])
        candidates = [
            _candidate_from(record, clamp if index == chosen else None)
            for index, record in enumerate(state["candidates"])
        ]
        rebuilt = {
            "clamp": clamp,
            "spec": Spec(**state["spec"]),
            "change": {name: Interval(*interval) for name, interval in state["change"].items()},
            "reliability": (before, after),
            "candidates": tuple(candidates),
            "chosen": None if chosen is None else candidates[chosen],
            "by_label": None if state["by_label"] is None else LabelMetrics.from_state(state["by_label"]),
        }
        return cls(**{**state, **rebuilt})


def _state_of(candidate: Candidate) -> dict[str, Any]:
    # Not its clamp: each may hold an image.
    refusal = None if candidate.refusal is None else tuple(candidate.refusal)
    return {**_fields_of(replace(candidate, clamp=None)), "refusal": refusal}


def _candidate_from(state: Mapping[str, Any], clamp: Clamp | None) -> Candidate:
    refusal = None if state["refusal"] is None else Refusal(*state["refusal"])
    return Candidate(**{**state, "refusal": refusal, "clamp": clamp})


def _fields_of(record: CalibrationResult | Candidate | Spec) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}
