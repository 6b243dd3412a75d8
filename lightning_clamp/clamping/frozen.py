"""Freeze a network for a while, and leave no trace."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def frozen(network: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put a network in eval mode with its parameters frozen, and restore every flag, buffer and random state after.

    The random states are those of torch, NumPy and Python, which loaders and transforms draw from. Gradients are
    enabled inside, also where the caller is under ``no_grad`` or ``inference_mode``. A plain callable has no flags to
    set; only the random state is kept for it.
    """
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    parameters = list(network.parameters()) if isinstance(network, nn.Module) else []
    training = [module.training for module in modules]
    requires_grad = [parameter.requires_grad for parameter in parameters]
    buffers = [
        (buffer, buffer.detach().clone()) for buffer in (network.buffers() if isinstance(network, nn.Module) else ())
    ]
    # cuDNN refuses the backward of a recurrent layer in eval mode; torch's own kernels do not.
    recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
    devices = {parameter.device.index for parameter in parameters if parameter.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state users' transforms use
    try:
        for module in modules:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        with (
            torch.random.fork_rng(sorted(index for index in devices if index is not None)),
            torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for parameter, flag in zip(parameters, requires_grad, strict=True):
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
