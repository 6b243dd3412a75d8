"""One layout for every kind of classifier output: rows of class logits, each with its target and its item.

Class outputs, dense outputs, one-logit heads and several labels per item differ only in how their tensors are laid out.
Everything that computes (metrics, temperature, scores) works on :class:`Rows`; the layouts are known here alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_clamp._checks import OptionError
from lightning_clamp._misfits import kind_of, of_each_class, to_axis_1, way_out

Task: TypeAlias = Literal["multiclass", "binary", "multilabel"]
TASKS: tuple[Task, ...] = ("multiclass", "binary", "multilabel")

# float32 numbers of a block, and half as many in float64: 4 MB stay in a processor's cache, and what is made of them is
# no memory that the system has to hand out anew each time; an accelerator wants few, large kernels.
_BLOCK_ELEMENTS = 2**20
_BLOCK_ELEMENTS_DEVICE = 2**26
_NARROW = 32
# Logits from here down are masked, as `masked_fill` with -inf, -1e9 or finfo.min leaves them: of probability 0.
MASKED = -1e4
# What stands for them in float64: no temperature brings it back, and products with a probability of 0 stay 0.
_NEVER = -1e12


class Rows(NamedTuple):
    """Logits of every scored position, and the item (sample) each position belongs to.

    Attributes:
        logits: Shape ``(M, C)``, float; a one-logit head gives the two columns ``(0, z)``, and so does each label of
            several per item, which is a row of its own.
        target: Shape ``(M,)``, int64, in ``[0, C)``.
        item: Shape ``(M,)``, int64, in ``[0, n_items)``.
        n_items: Items in the batch, also those of which every position is ignored.
        label: Which label of its item each row is, ``(M,)``, int64; None unless ``task="multilabel"``.
    """

    logits: Tensor
    target: Tensor
    item: Tensor
    n_items: int
    label: Tensor | None = None

    def per_item(self, values: Tensor) -> Tensor:
        """Sum ``values``, one per row and shape ``(M, ...)``, over the rows of each item: ``(n_items, ...)``."""
        return values.new_zeros(self.n_items, *values.shape[1:]).index_add(0, self.item, values)

    def doubled(self) -> "Rows":
        """In float64, with masked logits at one finite value."""
        logits = self.logits.double()
        return self._replace(logits=logits.where(logits > MASKED, _NEVER))


class Block(NamedTuple):
    """Some of the rows of a batch, in no item's terms; see :class:`Rows`.

    Attributes:
        logits: Shape ``(m, C)``.
        target: Shape ``(m,)``; where it came as floats, these: nobody has looked whether they are 0 and 1.
        label: Shape ``(m,)``; None unless ``task="multilabel"``.
    """

    logits: Tensor
    target: Tensor
    label: Tensor | None


_Part = TypeVar("_Part", Rows, Block)


def is_dense(logits: Tensor, task: Task) -> bool:
    """Whether ``logits`` hold several rows per item (pixels, labels), rather than one class distribution."""
    return logits.ndim > 2 if task == "multiclass" else logits[:1].numel() > 1


def as_rows(logits: Tensor, target: Tensor, *, task: Task = "multiclass", ignore_index: int | None = None) -> Rows:
    """Lay logits and target out as :class:`Rows`, leaving out positions whose target is ``ignore_index``.

    Args:
        logits: ``(N, C)`` or dense ``(N, C, ...)``; for ``task="binary"`` one logit per position, ``(N,)``, ``(N, 1)``
            or dense ``(N, 1, ...)`` or ``(N, ...)``; for ``task="multilabel"`` one per label, ``(N, K)`` or dense
            ``(N, K, ...)``.
        target: Class indices, ``(N,)`` or dense ``(N, ...)``; for ``task="binary"`` 0 or 1, int, bool or float. Either
            with or without an axis of length 1 in the place of the classes. For ``task="multilabel"`` 0 or 1 in the
            shape of the logits.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        ignore_index: Target value of positions, or of labels of an item, to leave out.

    Raises:
        TypeError: If either is no tensor, or the target's dtype cannot hold class indices.
        ValueError: If the shapes do not fit together, or there is one class only.
    """
    logits, target = _checked(logits, target, task)
    check_hard(target)
    rows = _kept(_in_items(logits, target, task), ignore_index)
    return rows._replace(target=rows.target.long())


def row_blocks(
    logits: Tensor, target: Tensor, *, task: Task = "multiclass", ignore_index: int | None = None
) -> Iterator[Block]:
    """The rows of :func:`as_rows` in blocks that stay in the processor's cache.

    A batch of any size is then worked through with a fixed amount of memory, and faster than in one piece. At least
    one block is given, of no rows if there are none. Errors are those of :func:`as_rows`.
    """
    logits, target = _checked(logits, target, task)
    for part, labels in [(logits, target)] if is_one_block(logits) else _parts(logits, target, _block_elements(logits)):
        yield _kept(_flat(part, labels, task), ignore_index)


def item_blocks(
    logits: Tensor, target: Tensor, *, task: Task = "multiclass", ignore_index: int | None = None
) -> Iterator[Rows]:
    """:func:`as_rows` of a batch in parts of about the size of :func:`row_blocks`, but of whole items.

    As in a :class:`Block`, nobody has looked at targets that came as floats.
    """
    logits, target = _checked(logits, target, task)
    size = max(1, _block_elements(logits) * len(logits) // max(1, logits.numel()))
    for part, labels in zip(torch.split(logits, size), torch.split(target, size), strict=True):
        yield _kept(_in_items(part, labels, task), ignore_index)


def merged(parts: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows and items in blocks of about the size of :func:`row_blocks`, or of one item if that is larger."""
    waiting: list[Rows] = []
    for part in (piece for whole in parts for piece in _split(whole)):
        if waiting and sum(one.logits.numel() for one in (*waiting, part)) > _block_elements(part.logits):
            yield _joined(waiting)
            waiting = []
        waiting.append(part)
    if waiting:
        yield _joined(waiting)


def merged_batches(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets of the same items in batches of about the size of :func:`row_blocks`, or of one as it is."""
    waiting: list[tuple[Tensor, Tensor]] = []
    size = 0
    for pair in pairs:
        size += pair[0].numel()
        if waiting and (size > _block_elements(pair[0]) or _layout(pair) != _layout(waiting[0])):
            yield _one_batch(waiting)
            waiting, size = [], pair[0].numel()
        waiting.append(pair)
    if waiting:
        yield _one_batch(waiting)


def _layout(pair: tuple[Tensor, Tensor]) -> list[object]:
    return [(tensor.shape[1:], tensor.dtype, tensor.device) for tensor in pair]


def _one_batch(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    logits, target = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    return logits, target


def _split(whole: Rows) -> Iterator[Rows]:
    """Whole items of rows, which follow one another, in parts of at most about the size of a block."""
    size = max(1, whole.n_items * _block_elements(whole.logits) // max(1, whole.logits.numel()))
    if size >= whole.n_items:
        yield whole
        return
    firsts = torch.arange(0, whole.n_items + size, size, device=whole.item.device)
    ends: list[int] = torch.searchsorted(whole.item, firsts).tolist()
    for first, start, end in zip(range(0, whole.n_items, size), ends, ends[1:], strict=False):
        label = None if whole.label is None else whole.label[start:end]
        items, n_items = whole.item[start:end] - first, min(size, whole.n_items - first)
        yield Rows(whole.logits[start:end], whole.target[start:end], items, n_items, label)


def is_narrow(logits: Tensor) -> bool:
    """Whether rows have so few columns that a CPU is faster along the columns than along the rows."""
    return logits.shape[1] <= _NARROW and logits.device.type == "cpu"


def log_softmax(logits: Tensor) -> Tensor:
    """Of each row ``(M, C)``; where there are few columns torch's own takes several times as long on a CPU."""
    if not is_narrow(logits):
        return logits.log_softmax(1)
    away = logits - logits.amax(1, keepdim=True)
    return away.sub_(away.exp().sum(1, keepdim=True).log_())


def softmax(logits: Tensor) -> Tensor:
    """Of each row ``(M, C)``, as :func:`log_softmax`."""
    return log_softmax(logits).exp_() if is_narrow(logits) else logits.softmax(1)


def _joined(parts: Sequence[Rows]) -> Rows:
    offsets = accumulate((part.n_items for part in parts), initial=0)
    labels = [part.label for part in parts if part.label is not None]
    return Rows(
        # Column by column in memory, so that an operation on few columns works along many rows.
        torch.cat([part.logits.T for part in parts], 1).T
        if is_narrow(parts[0].logits)
        else torch.cat([part.logits for part in parts]),
        torch.cat([part.target for part in parts]),
        torch.cat([part.item + offset for part, offset in zip(parts, offsets, strict=False)]),
        sum(part.n_items for part in parts),
        torch.cat(labels) if labels else None,
    )


def is_one_block(logits: Tensor) -> bool:
    """Whether :func:`row_blocks` gives a batch in one piece."""
    return logits.numel() <= _block_elements(logits)


def _block_elements(logits: Tensor) -> int:
    elements = _BLOCK_ELEMENTS if logits.device.type == "cpu" else _BLOCK_ELEMENTS_DEVICE
    return elements // 2 if logits.dtype == torch.float64 else elements


def _parts(logits: Tensor, target: Tensor, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split ``(N, C, S)`` and ``(N, S)``, or twice ``(N, K, S)``: by items, and by positions where one is large."""
    if logits.ndim == 2:
        logits, target = logits[..., None], target[..., None]
    classes, positions = logits.shape[1:]
    items = max(1, elements // max(1, classes * positions))
    for part, labels in zip(torch.split(logits, items), torch.split(target, items), strict=True):
        size = max(1, elements // (classes * max(1, len(part))))
        yield from zip(torch.split(part, size, -1), torch.split(labels, size, -1), strict=True)


def checked_target(logits: Tensor, target: Tensor, task: Task) -> Tensor:
    """Refuse logits and targets that do not fit together; errors are those of :func:`as_rows`.

    Returns:
        The target; of class indices without the axis of length 1 that it may have where the logits have the classes.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"The network must return one float tensor of logits, got {kind_of(logits)}: the numbers before the "
            "softmax or argmax are wanted."
        )
    if not isinstance(target, Tensor):
        raise TypeError(f"The target must be a tensor, got {kind_of(target)}.")
    if task == "binary":
        _check_binary(logits, target)
        return target
    if task == "multilabel":
        _check_multilabel(logits, target)
        return target
    return _class_indices(logits, target)


def class_axis_is_unclear(logits: Tensor, target: Tensor, task: Task) -> bool:
    """Whether shapes that fit together would also do so with the classes on the last axis, as in ``(N, L, C)``, L = C.

    A target with an axis of length 1 in the place of the classes, ``(N, 1, L)``, says that they are on axis 1.
    """
    return task == "multiclass" and logits.ndim > 2 and target.shape == logits.shape[:-1]


def unclear_axis(logits: Tensor, target: Tensor) -> str:
    """What there is to say where :func:`class_axis_is_unclear` holds for every batch."""
    return (
        f"Logits of shape {tuple(logits.shape)} and a target of shape {tuple(target.shape)} fit together in two ways, "
        f"with the classes on axis 1 or on the last: return logits.{to_axis_1(logits)} if they are on the last, and "
        "give the target that axis, target.unsqueeze(1), to say that they are on axis 1."
    )


def check_hard(target: Tensor) -> None:
    """Refuse labels between 0 and 1; this reads them, which an accelerator waits for."""
    if not target.is_floating_point():
        return
    if bool(target.isnan().any()):
        raise OptionError(
            "A target must be 0 or 1, got nan: let unknown labels be -1, target.nan_to_num(-1), and pass "
            "ignore_index=-1."
        )
    if bool((target != target.round()).any()):
        raise ValueError("A target must be 0 or 1, got a value between: soft labels have no calibration error.")


def _checked(logits: Tensor, target: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Logits ``(N, C, S)`` and target ``(N, S)`` with the positions of an item on one axis; views where possible.

    Several labels per item are ``(N, K, S)``, both.
    """
    target = checked_target(logits, target, task)
    if task == "binary":
        return logits[..., None].flatten(1)[:, None], target[..., None].flatten(1)
    if logits.ndim == 2:
        # No views, which on an accelerator take as long as what is computed.
        return logits, target
    return logits.flatten(2), target.flatten(1 if task == "multiclass" else 2)


def _flat(logits: Tensor, target: Tensor, task: Task) -> Block:
    """All rows of logits and targets as :func:`_checked` gives them."""
    target = target.flatten()
    target = target if target.is_floating_point() else target.long()
    if task == "multiclass":
        return Block(logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2), target, None)
    labels = None
    if task == "multilabel":
        numbers = torch.arange(logits.shape[1], device=logits.device)
        labels = (numbers if logits.ndim == 2 else numbers[:, None]).expand(logits.shape).flatten()
    positive = logits.flatten()
    return Block(torch.stack([torch.zeros_like(positive), positive], 1), target, labels)


def _in_items(logits: Tensor, target: Tensor, task: Task) -> Rows:
    """The same, with the item of each."""
    block, n = _flat(logits, target, task), len(logits)
    item = torch.arange(n, device=logits.device).repeat_interleave(len(block.logits) // max(n, 1))
    return Rows(block.logits, block.target, item, n, block.label)


def _kept(part: _Part, ignore_index: int | None) -> _Part:
    """Without the rows whose target is ``ignore_index``; all of them if it is None."""
    if ignore_index is None:
        return part
    # Numbers, for which an accelerator is waited once; a mask is counted at every use.
    kept = (part.target != ignore_index).nonzero()[:, 0]
    chosen: dict[str, Any] = {name: of[kept] for name, of in part._asdict().items() if isinstance(of, Tensor)}
    return part._replace(**chosen)


def _class_indices(logits: Tensor, target: Tensor) -> Tensor:
    """The target without its axis of length 1, if it has one; shapes are refused before dtypes."""
    if logits.ndim < 2 or logits.shape[1] == 1:
        raise OptionError(
            f"Logits must have one value per class on axis 1, (N, C) or (N, C, ...), got {tuple(logits.shape)}: "
            'say task="binary" for a one-logit (sigmoid) head.'
        )
    if logits.shape == target.shape:
        raise OptionError(f"The target has the shape of the logits, {tuple(target.shape)}: {of_each_class(target)}.")
    wanted = logits.shape[:1] + logits.shape[2:]
    if target.ndim == logits.ndim and target.shape[1] == 1:
        target = target.squeeze(1)
    if target.shape != wanted:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} (class axis 1) need a target of shape {tuple(wanted)}, got "
            f"{tuple(target.shape)}{way_out(logits, target)}."
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        whole = target.is_complex() or target.dtype == torch.bool or bool((target == target.round()).all())
        remedy = "; use target.long()" if whole else " between whole numbers: only a classifier can be calibrated"
        raise TypeError(f"The target must hold class indices as int64, got {target.dtype}{remedy}.")
    return target


def _check_binary(logits: Tensor, target: Tensor) -> None:
    if logits.ndim == 0:
        raise ValueError("A batch needs an axis, got a single number: a `squeeze` loses it when a batch has one item.")
    if logits.shape != target.shape and _without_unit_axis(logits) != _without_unit_axis(target):
        raise OptionError(
            f'task="binary" needs one logit per target, got logits of shape {tuple(logits.shape)} and a target of '
            f'shape {tuple(target.shape)}; for one logit per class say task="multiclass".'
        )


def check_labels_axis(logits: Tensor) -> None:
    """Refuse logits without an axis of labels."""
    if logits.ndim < 2:
        raise OptionError(
            f'task="multilabel" needs one logit per label on axis 1, (N, K) or (N, K, ...), got {tuple(logits.shape)}: '
            'for one logit per item say task="binary".'
        )


def _check_multilabel(logits: Tensor, target: Tensor) -> None:
    check_labels_axis(logits)
    if logits.shape != target.shape:
        raise OptionError(
            f'task="multilabel" needs a target of 0 and 1 in the shape of the logits, {tuple(logits.shape)}, got '
            f'{tuple(target.shape)}; for one class index per item say task="multiclass".'
        )


def _without_unit_axis(tensor: Tensor) -> torch.Size:
    shape = tensor.shape
    return shape[:1] + shape[2:] if len(shape) > 1 and shape[1] == 1 else shape
