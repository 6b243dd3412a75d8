"""How a network is run for the time of a measurement: its mode, and so that it can be differentiated twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Mode: TypeAlias = Literal["eval", "train"]
MODES: tuple[Mode, ...] = ("eval", "train")


@contextmanager
def in_mode(network: object, mode: Mode) -> Iterator[None]:
    """Put every part of a module into ``mode``, and each back into its own; other callables have none."""
    if not isinstance(network, nn.Module):
        yield
        return
    before = {module: module.training for module in network.modules()}
    try:
        network.train(mode == "train")
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Run networks uncompiled, and attention by its formula: compiled code and fused kernels have one derivative."""
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        yield


def check_first_derivative(loss: str) -> None:
    """Refuse a backward pass that is to be differentiated: ``once_differentiable`` lets one of a constant pass.

    Raises:
        RuntimeError: With ``create_graph=True``. Compiled code has one derivative anyway, and refuses a second itself.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{loss} cannot be differentiated twice: leave create_graph out, or train with another loss, such as "
            "mbls_loss or mdca_loss."
        )
