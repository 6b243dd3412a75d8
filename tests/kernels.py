"""What an accelerator is given to do, counted on tensors without values: small batches take their time for it."""

from typing import Any

# New memory, another look at old memory, what is asked of dtypes alone, and a number that is read.
_NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty"),
    *("detach", "_unsafe_view", "promote_types", "_local_scalar_dense"),
}


def is_kernel(function: Any) -> bool:
    """Whether an operation, as a ``TorchDispatchMode`` sees it, computes something."""
    return not function.is_view and function.overloadpacket.__name__ not in _NOTHING
