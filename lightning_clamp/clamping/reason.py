"""Why a candidate was chosen, in words."""

from collections.abc import Sequence

import torch

from lightning_clamp._checks import counted
from lightning_clamp.clamping.candidate import Candidate


def reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    """Say what was chosen, what is expected of it, and what was left out."""
    richer = [one for one in candidates if one.criterion is not None and one.n_parameters > 1]
    if chosen.n_parameters > 1:
        words = (
            f"{chosen.name}{_with_share(chosen)} lowers the calibration NLL by {chosen.achieved_gain:.4f} against "
            f"temperature scaling with {chosen.effective_parameters:.1f} effective parameters; held out it is expected "
            f"to change by {chosen.expected_change:+.4f} ± {chosen.standard_error:.4f}: the best of "
            f"{counted(len(richer) + 1, 'candidate')}"
        )
    elif richer:
        best = min(richer, key=lambda one: one.rank)
        words = (
            f"temperature alone: the best of {counted(len(richer), 'richer candidate')}, {best.name}, is expected to "
            f"change the held-out NLL by {best.expected_change:+.4f} ± {best.standard_error:.4f}, no improvement to "
            "rely on"
        )
    else:
        words = "temperature alone: there was no richer candidate"
    return f"{words}{_strongest(chosen)}{_skewed(chosen)}{_left_out(candidates)}"


def _with_share(chosen: Candidate) -> str:
    if chosen.clamp is None or chosen.clamp.uniform_share is None:
        return ""
    return f" with a uniform share of {float(chosen.clamp.uniform_share):.2%}"


def _strongest(chosen: Candidate) -> str:
    """Which class's logit a matrix lets count most for another class."""
    if chosen.clamp is None or chosen.clamp.class_matrix is None:
        return ""
    matrix = chosen.clamp.class_matrix.double()
    # What a logit does to all other classes alike, it does to none.
    others = ~torch.eye(len(matrix), dtype=torch.bool)
    centred = (matrix - (matrix * others).sum(0) / (len(matrix) - 1)) * others
    to, source = divmod(int(centred.abs().argmax()), len(matrix))
    word = "raises" if float(centred[to, source]) > 0 else "lowers"
    return f"; above all, class {source}'s logit {word} class {to}"


def _skewed(chosen: Candidate) -> str:
    """Which of two classes has the steeper slope."""
    if chosen.clamp is None or chosen.clamp.skew is None:
        return ""
    more = int(float(chosen.clamp.skew) < 0)
    return f"; evidence for class {more} counts more than evidence for class {1 - more}"


def _left_out(candidates: Sequence[Candidate]) -> str:
    """What was not fitted, by the reason for it; nothing of what goes without saying."""
    names: dict[str, list[str]] = {}
    for one in candidates:
        if one.refusal is not None and not one.refusal.is_silent:
            names.setdefault(one.refusal.words, []).append(one.left_out)
    sentences = [f"{' and '.join(those)} because {words}" for words, those in names.items()]
    return f" (left out: {'; '.join(sentences)})" if sentences else ""
