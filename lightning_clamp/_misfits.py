"""What would make a target fit the logits beside it, in words, as far as their shapes tell."""

from torch import Tensor


def of_each_class(target: Tensor) -> str:
    """What to do about a target that has a value for each class."""
    several = 'for several labels per item, each yes or no, say task="multilabel"'
    if bool((target.double().sum(1) > 1).any()):
        return several
    return f"of one-hot labels pass the class indices, target.argmax(1); {several}"


def way_out(logits: Tensor, target: Tensor) -> str:
    """What would make the shapes fit, as far as they tell."""
    items, classes, *places = logits.shape
    shape = list(target.shape)
    if shape == [items, *places, 1]:
        return ": use target.squeeze(-1)"
    if shape == [items, *places, classes]:
        return ": of one-hot labels pass the class indices, target.argmax(-1)"
    if shape in ([*logits.shape[:-1]], [*logits.shape[:-1], 1]) and places:
        return f": where the classes are on the last axis, return logits.{to_axis_1(logits)}"
    if shape == [items] and set(places) == {1}:
        return ": return logits.flatten(1)"
    if len(places) > 1 and len(shape) == 1 + len(places) and shape[0] == items:
        return f": return logits of its size, torch.nn.functional.interpolate(logits, {tuple(shape[1:])})"
    return ""


def to_axis_1(logits: Tensor) -> str:
    """The call that moves classes from the last axis to axis 1."""
    return "transpose(1, 2)" if logits.ndim == 3 else "movedim(-1, 1)"


def kind_of(value: object) -> str:
    """The dtype of a tensor, the type of anything else."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
