"""Batches that are kept in memory, so that a loader which decodes images does so once; and how much may be kept."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lightning_clamp._batch import Inputs, map_tensors, tensors_of
from lightning_clamp._checks import check_whole

# Of what is free, on the network's device and in the host's memory: the passes need the rest.
_SHARE = 1 / 4
# Where a system does not say what is free.
_UNKNOWN = 2**32
# Files of a control group, by its controllers: none in version 2. Limit, use, and the file cache among its statistics.
_NAMES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
# Logits of a pass. A number, whatever is free: it decides whether a matrix is tried, and a fit is to come out alike
# on every machine.
_LOGITS = 2**28

Pair = tuple[Inputs, Tensor]


def check_cache_bytes(cache_bytes: int | None) -> None:
    """Refuse what is no size.

    Raises:
        ValueError: If it is not None, and no whole number of at least 0.
    """
    if cache_bytes is not None:
        check_whole("cache_bytes", cache_bytes, least=0)


def most_of_logits(cache_bytes: int | None) -> int:
    """Most bytes of the logits of a pass that are kept."""
    return _LOGITS if cache_bytes is None else cache_bytes


class KeptBatches:
    """The batches of a pass in their order, as the network was given them: all, or none where they do not fit.

    They stay on the network's device while there is room, and go to the host's memory from there on. Each is a copy:
    loaders may use their buffers again.

    Args:
        cache_bytes: Most that may be kept; None for a quarter of what is free on the device, and a quarter of what
            is free in the host's memory.
        n_ranks: Processes that may share the host's memory.
    """

    def __init__(self, cache_bytes: int | None, n_ranks: int = 1) -> None:
        self.cache_bytes = cache_bytes
        self.n_ranks = n_ranks
        self.is_complete = False
        self._pairs: list[tuple[Pair, torch.device]] | None = None if cache_bytes == 0 else []
        self._room: tuple[int, int] | None = None

    def start(self) -> None:
        """Say that a pass begins; what one that was not finished has left is let go of."""
        if self._pairs:
            self._pairs, self._room = [], None

    def add(self, inputs: Inputs, target: Tensor) -> None:
        """Keep a batch; past the limit all are let go of."""
        if self._pairs is None:
            return
        device, size = target.device, sum(tensor.nbytes for tensor in [*tensors_of(inputs), target])
        on_device, on_host = self._room or self._measured(device)
        if size <= on_device:
            place, on_device = device, on_device - size
        else:
            place, on_host = torch.device("cpu"), on_host - size
        self._room = on_device, on_host
        if on_host < 0:
            self._pairs = None
        else:
            self._pairs.append((_copied(inputs, target, place), device))

    def complete(self) -> None:
        """Say that a pass has ended: what is kept are all of its batches."""
        self.is_complete = self._pairs is not None

    def __iter__(self) -> Iterator[Pair]:
        """Yield the batches, each on the device that it was on; who changes them in place takes a copy."""
        for (inputs, target), device in self._pairs or ():
            yield map_tensors(inputs, lambda value: _sent(value, device)), _sent(target, device)  # noqa: B023

    def _measured(self, device: torch.device) -> tuple[int, int]:
        """Bytes for batches on the device, and for more of them in the host's memory."""
        on_device = int(_SHARE * _free_on(device))
        if self.cache_bytes is None:
            return on_device, int(_SHARE * free_host_memory() / self.n_ranks)
        on_device = min(on_device, self.cache_bytes)
        return on_device, self.cache_bytes - on_device


def _copied(inputs: Inputs, target: Tensor, place: torch.device) -> Pair:
    return map_tensors(inputs, lambda value: value.detach().to(place, copy=True)), target.to(place, copy=True)


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """On the device that it was on; out of the host's memory while a GPU is still at work on the batch before.

    Only what is on its way is pinned: torch holds on to pinned memory, and rounds it up.
    """
    if device.type != "cuda" or value.is_cuda:
        return value.to(device)
    return _pinned(value).to(device, non_blocking=True)


def _pinned(value: Tensor) -> Tensor:
    """A copy that a GPU can read by itself, or the tensor itself where the system has no such memory left."""
    try:
        return value.pin_memory()
    except RuntimeError:
        return value


def _free_on(device: torch.device) -> int:
    """Free bytes of an accelerator's own memory; 0 where there is none."""
    if device.type != "cuda":
        return 0
    # What torch holds in reserve is free, too.
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def free_host_memory() -> int:
    """Bytes of the host's memory that are free for this process: those of its container, if it is in one."""
    free = _meminfo()
    limits = [free] if free is not None else []
    return min([*limits, *_free_in_groups()], default=_UNKNOWN)


def _meminfo(path: Path = Path("/proc/meminfo")) -> int | None:
    """What Linux says is available; None elsewhere."""
    if not path.exists():
        return None
    sizes = dict(line.split(":") for line in path.read_text().splitlines())
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else None


def _free_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What is left of the limits of the control groups that the process is in, of both versions."""
    lines = [line.split(":", 2) for line in own.read_text().splitlines()] if own.exists() else []
    left = []
    for _, controllers, inner in lines:
        if controllers in _NAMES:
            top = root / controllers
            folder = top / inner.lstrip("/")
            groups = [group for group in (folder, *folder.parents) if group.is_relative_to(top)]
            left += [free for group in groups for free in _left(group, *_NAMES[controllers])]
    return left


def _left(group: Path, limit: str, used: str, cache: str) -> list[int]:
    """What is left of a group's limit, its file cache counted as free; nothing where it has none."""
    most, statistics = group / limit, group / "memory.stat"
    if not most.exists() or most.read_text().strip() == "max":
        return []
    sizes = dict(line.split() for line in statistics.read_text().splitlines()) if statistics.exists() else {}
    return [max(0, int(most.read_text()) - int((group / used).read_text()) + int(sizes.get(cache, 0)))]
