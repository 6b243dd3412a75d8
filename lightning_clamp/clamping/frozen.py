"""Freeze a network for a while, and leave no trace."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def kept_random_state(devices: Iterable[int] = ()) -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python after, which loaders and transforms draw from.

    Args:
        devices: CUDA devices whose generators to keep as well.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global state is what users' transforms draw from
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def frozen(network: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put a network in eval mode with its parameters frozen, and restore every flag, buffer and random state after.

    Gradients are enabled inside, also where the caller is under ``no_grad`` or ``inference_mode``. A plain callable has
    no flags to set; only the random state is kept for it.
    """
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    parameters = [parameter for module in modules[:1] for parameter in module.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for module in modules[:1] for buffer in module.buffers()]
    training = [module.training for module in modules]
    requires_grad = [parameter.requires_grad for parameter in parameters]
    # cuDNN refuses the backward of a recurrent layer in eval mode; torch's own kernels do not.
    recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
    devices = {parameter.get_device() for parameter in parameters if parameter.is_cuda}
    try:
        for module in modules:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        with (
            kept_random_state(sorted(devices)),
            torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for parameter, flag in zip(parameters, requires_grad, strict=True):
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
