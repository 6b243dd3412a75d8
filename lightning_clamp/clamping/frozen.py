"""Freeze a network for a while, and leave no trace."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lightning_clamp.clamping.restored import keep_attributes, keep_value


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
    """Put a network in eval mode with its parameters frozen, and restore every trace of what was run after.

    Restored are flags, buffers, attributes (such as activations that are kept) and random states, each on its own:
    what one cannot be given back costs none of the others. Gradients are enabled inside, also where the caller is under
    ``no_grad`` or ``inference_mode``. A function that is no module, nor a module's method, has nothing to set; only the
    random state is kept for it.
    """
    module = module_of(network)
    with ExitStack() as undone:
        if module is not None:
            _freeze(module, undone)
        with kept_random_state(), torch.inference_mode(False), torch.enable_grad():
            yield


def _freeze(module: nn.Module, undone: ExitStack) -> None:
    parts, buffers = list(module.modules()), list(_own_buffers(module))
    # Values come last, when attributes are what they were.
    for part, name, buffer in buffers:
        if not buffer.is_inference():
            with torch.inference_mode(False):
                undone.callback(keep_value(buffer))
        undone.callback(_put_back, part, name, buffer)
    for undo in keep_attributes(module):
        undone.callback(undo)
    for parameter in module.parameters():
        flag = parameter.requires_grad
        parameter.requires_grad_(False)
        undone.callback(parameter.requires_grad_, flag)
    for part in parts:
        undone.callback(setattr, part, "training", part.training)
        part.training = False
    for part, name, buffer in buffers:
        if buffer.is_inference():
            # Made in a validation under inference mode, and of no use where gradients are wanted.
            with torch.inference_mode(False):
                setattr(part, name, buffer.clone())
    if any(isinstance(part, nn.RNNBase) for part in parts):
        undone.enter_context(_without_cudnn())


def _own_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for part in module.modules():
        yield from ((part, name, buffer) for name, buffer in part.named_buffers(recurse=False))


def _put_back(part: nn.Module, name: str, buffer: Tensor) -> None:
    """For modules of TorchScript, which have no attributes that Python could see."""
    if getattr(part, name) is not buffer:
        setattr(part, name, buffer)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """CuDNN refuses the backward of a recurrent layer in eval mode; torch's own kernels do not.

    Not by ``cudnn.flags``, which sets all flags there are, and raises where those of convolutions and recurrent layers
    differ.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
