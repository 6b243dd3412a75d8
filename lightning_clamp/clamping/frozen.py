"""Freeze a network for a while, and leave no trace."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the random states of torch (all devices), NumPy and Python after: loaders and transforms draw from them.

    A generator that a loader was given as its own is not touched, and goes on.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global state is what users' transforms draw from
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def module_of(network: Callable[[Tensor], Tensor]) -> nn.Module | None:
    """The module behind a callable: itself, or the one whose method it is; None for any other function."""
    owner = getattr(network, "__self__", network)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def frozen(network: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put a network in eval mode with its parameters frozen, and restore every flag, buffer and random state after.

    Gradients are enabled inside, also where the caller is under ``no_grad`` or ``inference_mode``. A function that is
    no module, nor a module's method, has nothing to set; only the random state is kept for it.
    """
    module = module_of(network)
    modules = [] if module is None else list(module.modules())
    parameters = [] if module is None else list(module.parameters())
    training = [part.training for part in modules]
    requires_grad = [parameter.requires_grad for parameter in parameters]
    with torch.inference_mode(False):
        buffers = [
            (part, name, buffer, buffer.detach().clone())
            for part in modules
            for name, buffer in part.named_buffers(recurse=False)
        ]
    # cuDNN refuses the backward of a recurrent layer in eval mode; torch's own kernels do not.
    recurrent = any(isinstance(part, nn.RNNBase) for part in modules)
    try:
        for part in modules:
            part.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        for part, name, buffer, value in buffers:
            if buffer.is_inference():
                # Made in a validation under inference mode, and of no use where gradients are wanted.
                setattr(part, name, value)
        with (
            kept_random_state(),
            torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        for part, flag in zip(modules, training, strict=True):
            part.training = flag
        for parameter, flag in zip(parameters, requires_grad, strict=True):
            parameter.requires_grad_(flag)
        for part, name, buffer, value in buffers:
            _restore(part, name, buffer, value)


def _restore(module: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    """Give a buffer its value back, and its place if the module put another tensor there."""
    if getattr(module, name) is not buffer:
        setattr(module, name, buffer)
    # An inference tensor was put aside meanwhile, and nothing could change it.
    if not buffer.is_inference() and not torch.equal(buffer, value):
        with torch.no_grad():
            buffer.copy_(value)
