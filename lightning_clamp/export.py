"""A calibrated model for places where this package is not installed: a program, an ONNX file, or plain weights."""

import copy
import inspect
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_clamp._batch import Inputs, copied, map_tensors
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.copies import independent_copy
from lightning_clamp.spec import Spec

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

# What an export may differ from the module by, as a fraction of the largest logit: float32 rounds in another order.
TOLERANCE = 1e-5


class Calibrated(Protocol):
    """What is exported: a module from inputs to calibrated logits, such as a ``CalibrationModule``."""

    network: nn.Module
    clamp: Clamp
    spec: Spec

    def __call__(self, inputs: Inputs) -> Tensor:
        """Calibrated logits."""
        ...

    def cpu(self) -> Any:
        """Itself, moved to the CPU."""
        ...


class Folded(NamedTuple):
    """A network that gives calibrated logits by itself: ``network(x + perturbation)``.

    Attributes:
        network: Copy of the user's network, on the CPU, of the same class and with the same names in its state dict.
        perturbation: What to add to every input, the shape of one input; None for nothing.
    """

    network: nn.Module
    perturbation: Tensor | None


def to_exported_program(module: Calibrated, example: Any = None, **options: Any) -> ExportedProgram:
    """Capture the calibrated model with ``torch.export``; the batch axis takes any size.

    Args:
        module: The calibrated model.
        example: A batch of inputs, a tensor or a dict of tensors, by default the network's ``example_input_array``. A
            tuple is taken for a dict with the names of forward's arguments.
        **options: Of ``torch.export.export``. ``dynamic_shapes`` replaces the one that lets the batch axis vary.

    Returns:
        A program from inputs to calibrated logits: ``torch.export.save`` it.

    Raises:
        TypeError: If the example is neither a tensor nor a dict of tensors.
        ValueError: If there is no example.
        Exception: Torch's own, if the network cannot be captured.
    """
    # Torch looks at shapes and dtypes alone, and keeps its example in the file: nobody's data belong there.
    inputs: Any = map_tensors(_inputs(module, example), torch.zeros_like)
    if "dynamic_shapes" not in options:
        # Two rows, because torch takes an axis of length 1 for one that is never longer. The limit is for torch 2.6,
        # which without one trips over a limit that it finds in attention, far beyond this.
        inputs = map_tensors(inputs, lambda tensor: tensor.new_zeros(2, *tensor.shape[1:]))
        rows = {0: Dim("batch", max=2**31 - 1)}
        options["dynamic_shapes"] = (dict.fromkeys(inputs, rows) if isinstance(inputs, dict) else rows,)
    # strict=False runs the network's Python with symbolic tensors, where strict=True would have to understand it.
    return torch.export.export(cast(nn.Module, module), (inputs,), **{"strict": False, **options})


def to_onnx(
    module: Calibrated,
    path: str | os.PathLike[str] | BytesIO | None = None,
    example: Any = None,
    **options: Any,
) -> "ONNXProgram | None":
    """Write the calibrated model as ONNX, with torch's own exporter; the batch axis takes any size.

    The file has an input ``inputs``, or one per entry of a dict under its name, and an output ``logits``. Weights are
    in the file itself where ONNX has room for them (2 GB).

    Args:
        module: The calibrated model.
        path: File to write, or a buffer; None for none.
        example: As in :func:`to_exported_program`.
        **options: Of ``torch.onnx.export``, such as ``opset_version``.

    Returns:
        What ``torch.onnx.export`` returns.

    Raises:
        ModuleNotFoundError: If ``onnx`` or ``onnxscript`` is not installed.
        Exception: As in :func:`to_exported_program`.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ModuleNotFoundError(f"Export to ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}.")
    inputs = _inputs(module, example)
    names = list(inputs) if isinstance(inputs, dict) else ["inputs"]
    defaults = {
        "input_names": names,
        "output_names": ["logits"],
        # Of a captured program this is only the name of its axes; they have one between them.
        "dynamic_shapes": [{0: "batch"}, *[None] * (len(names) - 1)],
        "external_data": False,
        "verbose": False,
    }
    file = None if isinstance(path, BytesIO) else path
    program = torch.onnx.export(to_exported_program(module, inputs), (), file, **{**defaults, **options})
    if isinstance(path, BytesIO) and program is not None:
        path.write(program.model_proto.SerializeToString())
    return program


def fold(module: Calibrated, example: Any = None) -> Folded:
    r"""Move the output map into the weights of the network's last layer.

    A linear layer or convolution with one output per class that ends the network takes it exactly:
    :math:`a \circ (W h + c) / T + b = (a / T \circ W) h + (a / T \circ c + b)`, and as exactly a matrix in place of a.
    The last such layer is taken with which the logits of the example come out calibrated.

    Args:
        module: The calibrated model; it is left alone.
        example: As in :func:`to_exported_program`. Real inputs: what none of them shows is not checked.

    Raises:
        ValueError: If no layer takes the output map (none takes a skew or a uniform share), the perturbation is not
            added to the network's own input, or the outputs are the mean over views.
        TypeError: If the example is neither a tensor nor a dict of tensors.
    """
    if module.clamp.perturbation is not None and module.spec.perturb_at is not None:
        raise ValueError(
            f"The perturbation is added inside the network, at {module.spec.perturb_at!r}, where no state dict can "
            "hold it: export with to_exported_program or to_onnx."
        )
    if module.spec.views:
        raise ValueError(
            f"The outputs are the mean over {module.spec.n_views} views of an image, which no layer's weights can "
            "hold: export with to_exported_program or to_onnx, or fit without `views`."
        )
    if module.clamp.uniform_share is not None:
        raise ValueError(
            f"The clamp mixes the probabilities with a uniform share of {float(module.clamp.uniform_share):.2%}, which "
            "no layer's weights can hold: export with to_exported_program or to_onnx, or fit with uniform_share=False."
        )
    if module.clamp.skew is not None:
        raise ValueError(
            "The clamp has a skew (the output map 'beta'), which no layer's weights can hold: export with "
            "to_exported_program or to_onnx, or fit with output_maps=('vector',)."
        )
    # On the CPU, where matrix products are of full precision unless asked otherwise.
    folded = cast(Calibrated, independent_copy(cast(nn.Module, module)).cpu())
    inputs, perturbation = _inputs(folded, example), folded.clamp.perturbation
    with torch.no_grad():
        # Of copies: a network may change its input in place.
        expected, output_map = folded(copied(inputs)), _output_map(folded.clamp)
        folded.clamp = Clamp(perturbation)
        if torch.equal(folded(copied(inputs)), expected):
            return Folded(folded.network, perturbation)
        refusals = []
        for name in _last_layers(module.network, 1 if module.spec.binary else expected.shape[1]):
            refusal = _refusal(module.network, name, output_map) or _tried(folded, name, output_map, inputs, expected)
            if refusal is None:
                return Folded(folded.network, perturbation)
            refusals.append(f"{name!r} {refusal}")
    reasons = "; ".join(refusals[:3]) or "none is linear with one output per class"
    raise ValueError(
        f"No layer of {type(module.network).__name__} takes the output map ({reasons}): export with "
        "to_exported_program or to_onnx, which need no such layer."
    )


def _inputs(module: Calibrated, example: Any) -> Inputs:
    """The example on the module's device, a tensor or a plain dict of tensors; a tuple has the names of forward."""
    if example is None:
        example = getattr(module.network, "example_input_array", None)
    if example is None:
        raise ValueError("An export needs an example: pass a batch of inputs, or set the model's example_input_array.")
    if isinstance(example, tuple | list):
        # As Lightning has it for a network of several inputs.
        example = _by_name(module.network, example)
    tensors = list(example.values()) if isinstance(example, Mapping) else [example]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        kinds = ", ".join(type(tensor).__name__ for tensor in tensors)
        raise TypeError(f"The example must be a batch of inputs, a tensor or a dict of tensors, got {kinds}.")
    device = module.clamp.log_temperature.device
    return map_tensors(example, lambda tensor: tensor.to(device))


def _by_name(network: nn.Module, example: Sequence[Any]) -> dict[str, Any]:
    """Several inputs by the names that the arguments of the network's forward have."""
    names = list(inspect.signature(network.forward).parameters)
    if len(example) > len(names):
        raise TypeError(
            f"The example has {len(example)} inputs, and forward of {type(network).__name__} takes {len(names)} "
            f"({', '.join(names)}): pass one for each."
        )
    return dict(zip(names, example, strict=False))


def _output_map(clamp: Clamp) -> tuple[Tensor, Tensor]:
    """The map that the clamp applies to logits, float64: factors, ``(C,)`` or ``(1,)``, or a matrix; and offsets."""
    sizes = [len(part) for part in (clamp.class_scale, clamp.class_matrix, clamp.class_bias) if part is not None]
    size = max(sizes, default=1)
    zeros, unit = torch.zeros(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    offsets = clamp.scale(zeros)
    matrix = (clamp.scale(unit) - offsets).T
    return matrix if clamp.class_matrix is not None else matrix.diagonal(), offsets[0]


def _last_layers(network: nn.Module, n_outputs: int) -> Iterator[str]:
    """Names of the linear layers and convolutions with so many outputs, the last first."""
    for name, layer in reversed(list(network.named_modules())):
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and len(layer.weight) == n_outputs:
            yield name


def _refusal(network: nn.Module, name: str, output_map: tuple[Tensor, Tensor]) -> str | None:
    """Why the map cannot be put into this layer's weights; None if it can."""
    layer = network.get_submodule(name)
    own = dict(layer.named_parameters(recurse=False))
    if "weight" not in own:
        return "computes its weight from other parameters"
    if own["weight"].dtype.itemsize < 4:
        return f"is {own['weight'].dtype}, too coarse for the map: fold module.float()"
    if "bias" not in own and bool(output_map[1].any()):
        return "has no bias, and the clamp has one"
    users = Counter(_storage(tensor) for other in network.modules() for tensor in _own_tensors(other))
    if any(users[_storage(tensor)] > 1 for tensor in own.values()):
        return "shares its parameters with another module"
    return None


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tried(
    module: Calibrated, name: str, output_map: tuple[Tensor, Tensor], inputs: Inputs, expected: Tensor
) -> str | None:
    """Put the map into a layer; if the logits are not as expected, take it back and say so."""
    layer = module.network.get_submodule(name)
    kept = copy.deepcopy(layer.state_dict())
    _put_into(layer, output_map)
    error = float((module(copied(inputs)) - expected).abs().max() / expected.abs().max())
    if error <= TOLERANCE:
        return None
    layer.load_state_dict(kept)
    return f"is not the last step: logits would be off by {error:.1g} of the largest"


def _put_into(layer: nn.Module, output_map: tuple[Tensor, Tensor]) -> None:
    factors, offsets = output_map
    matrix = factors if factors.ndim == 2 else None
    for name, parameter in layer.named_parameters(recurse=False):
        # One row per output, whatever else a weight has.
        flat = parameter.double().reshape(len(parameter), -1)
        scaled = (factors[:, None] * flat if matrix is None else matrix @ flat).reshape(parameter.shape)
        parameter.copy_(scaled + offsets if name == "bias" else scaled)
