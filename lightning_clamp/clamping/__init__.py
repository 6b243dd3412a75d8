"""Neural Clamping and its relatives, in plain PyTorch: nothing here knows of Lightning."""

from lightning_clamp.clamping.batch import (
    BatchKeys,
    Inputs,
    as_pair,
    call,
    check_batch_keys,
    input_of,
    logits_of,
    with_logits,
)
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.entry import first_changed, first_parameter, one_changed, submodule
from lightning_clamp.clamping.fit import check_options, fit_clamp
from lightning_clamp.clamping.frozen import kept_random_state
from lightning_clamp.clamping.ranks import ALONE, Ranks
from lightning_clamp.clamping.result import CalibrationResult, Solver
from lightning_clamp.clamping.selection import Candidate
from lightning_clamp.clamping.survey import MIN_SAMPLES

__all__ = [
    "ALONE",
    "MIN_SAMPLES",
    "BatchKeys",
    "CalibrationResult",
    "Candidate",
    "Clamp",
    "Inputs",
    "Ranks",
    "Solver",
    "as_pair",
    "call",
    "check_batch_keys",
    "check_options",
    "first_changed",
    "first_parameter",
    "fit_clamp",
    "input_of",
    "kept_random_state",
    "logits_of",
    "one_changed",
    "submodule",
    "with_logits",
]
