"""What a network returns for a batch, read as logits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_clamp._batch import Inputs, call_network, logits_of

# Fewer outputs of a sigmoid's range may be small logits by chance.
_TELLING = 8
# A softmax in half precision sums to 1 within this.
_ROUNDING = 2e-2


class Logits(nn.Module):
    """The logits of a network alone, whatever else it returns.

    A module, so that whoever changes the mode of the network's parts finds them.

    Args:
        network: Anything that :func:`~lightning_clamp._batch.logits_of` reads.
        see: Called with the logits.
    """

    def __init__(self, network: nn.Module, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.network = network
        self.see = see

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits of a batch; errors are those of ``logits_of``."""
        logits = logits_of(call_network(self.network, inputs))
        self.see(logits)
        return logits


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it reads values
def complaint_of_probabilities(logits: Tensor, binary: bool) -> str | None:
    """What to say of a batch of outputs that are probabilities; None for logits. This reads them."""
    if not logits.is_floating_point() or not bool(((logits >= 0) & (logits <= 1)).all()):
        return None
    if binary:
        if logits.numel() < _TELLING:
            return None
        return "every output of the first batch lies in [0, 1]: if these are probabilities, leave the final sigmoid out"
    if logits.ndim < 2 or logits.shape[1] < 2 or not bool(((logits.float().sum(1) - 1).abs() <= _ROUNDING).all()):
        return None
    return "every row of the first batch lies in [0, 1] and sums to 1, as probabilities do: leave the final softmax out"
