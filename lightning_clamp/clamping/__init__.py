"""Neural Clamping and its relatives, in plain PyTorch: nothing here knows of Lightning."""

from lightning_clamp._batch import (
    BatchKeys,
    Inputs,
    as_pair,
    call_network,
    check_batch_keys,
    input_of,
    logits_of,
    with_logits,
)
from lightning_clamp.clamping.candidate import Candidate
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.fit import check_options, fit_clamp
from lightning_clamp.clamping.frozen import kept_random_state
from lightning_clamp.clamping.ranks import ALONE, Ranks
from lightning_clamp.clamping.result import CalibrationResult, Method
from lightning_clamp.clamping.site import first_parameter, map_first_argument, map_single_tensor, submodule
from lightning_clamp.clamping.summary import MIN_SAMPLES

__all__ = [
    "ALONE",
    "MIN_SAMPLES",
    "BatchKeys",
    "CalibrationResult",
    "Candidate",
    "Clamp",
    "Inputs",
    "Method",
    "Ranks",
    "as_pair",
    "call_network",
    "check_batch_keys",
    "check_options",
    "first_parameter",
    "fit_clamp",
    "input_of",
    "kept_random_state",
    "logits_of",
    "map_first_argument",
    "map_single_tensor",
    "submodule",
    "with_logits",
]
