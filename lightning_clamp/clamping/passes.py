"""Passes over the calibration set, each of which ends in additive sums.

Every number the methods use is a sum over samples, formed in :func:`summed` alone: the result does not depend on the
order or the size of the batches, nor on how they are shared out to ranks.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_clamp._batch import Inputs, copied, logits_of, map_tensors, n_items
from lightning_clamp._rows import Rows, merged, merged_batches
from lightning_clamp.clamping.frozen import kept_random_state, module_of
from lightning_clamp.clamping.kept import KeptBatches, most_of_logits
from lightning_clamp.clamping.perturbation import shifted
from lightning_clamp.clamping.ranks import ALONE, FAILURES, Ranks
from lightning_clamp.clamping.site import PerturbationSite
from lightning_clamp.spec import Spec

Network: TypeAlias = Callable[..., Any]
Batches: TypeAlias = Iterable[Any]
Progress: TypeAlias = Callable[[str, int], None]


def summed(
    batch_sums: Iterable[tuple[Tensor, ...]], shapes: Sequence[Sequence[int]], ranks: Ranks = ALONE
) -> tuple[Tensor, ...]:
    """Sum tuples of tensors position by position, over batches and ranks. The one place where such sums are formed.

    Args:
        batch_sums: One tuple per batch of this rank, which may have none.
        shapes: The shapes of a tuple's tensors.
        ranks: The ranks that take part, all of which call this; an error of one is raised on all.

    Returns:
        The sums, float64 on the CPU.
    """
    total, error = _accumulated(batch_sums)
    return ranks.total(total or [torch.zeros(tuple(shape), dtype=torch.float64) for shape in shapes], error)


def _accumulated(batch_sums: Iterable[tuple[Tensor, ...]]) -> tuple[list[Tensor], BaseException | None]:
    """Sums over this rank's batches alone, empty if there are none; and what went wrong, for the ranks to agree on."""
    total: list[Tensor] = []
    try:
        for sums in batch_sums:
            if not total:
                total = [term.to(torch.float64, copy=True) for term in sums]
                continue
            for accumulated, term in zip(total, sums, strict=True):
                accumulated += term
    except FAILURES as error:
        return total, error
    return total, None


class RowSource(Protocol):
    """Something that yields the same rows of logits every time it is iterated, and knows who has the others."""

    @property
    def ranks(self) -> Ranks:
        """The ranks that share the rows out."""
        ...

    def __iter__(self) -> Iterator[Rows]:
        """Yield the rows batch by batch."""
        ...


def check_batches(batches: Any) -> None:
    """Refuse what is no set of batches that can be read again and again.

    Raises:
        TypeError: With what to pass instead.
    """
    way_out = ""
    if isinstance(batches, str):
        way_out = ": pass the loader itself"
    elif isinstance(batches, Iterator) or (isinstance(batches, Iterable) and _is_spent_by_reading(batches)):
        way_out = ", which can be read once: no generator will do, nor an __iter__ that always returns the same one"
    elif isinstance(batches, Iterable):
        return
    elif isinstance(batches, Dataset):
        way_out = ": pass DataLoader(dataset, batch_size=...)"
    elif hasattr(batches, "val_dataloader"):
        way_out = ": pass one of its loaders, such as datamodule.val_dataloader()"
    elif inspect.isroutine(batches):
        way_out = ": call it, and pass what it returns"
    raise TypeError(
        f"The calibration set must be a DataLoader or a list of batches, got {type(batches).__name__}{way_out}."
    )


def _is_spent_by_reading(batches: Iterable[Any]) -> bool:
    """Whether the set hands out one and the same iterator, whoever asks; one that is its own may start anew."""
    source = batches.dataset if isinstance(batches, DataLoader) else batches
    if not isinstance(source, Iterable):
        return False
    with kept_random_state():
        first = iter(source)
        return first is not source and first is iter(source)


def is_own_iterator(batches: Any) -> bool:
    """Whether the set is, or reads in this process from, an iterator of its own, which has to start anew by itself."""
    in_process = isinstance(batches, DataLoader) and batches.num_workers == 0
    return isinstance(batches.dataset if in_process else batches, Iterator)


class CalibrationSet:
    """A network and its calibration batches, seen as a source of logits and of sums.

    Args:
        network: Callable from inputs to logits. Freezing it is the caller's business (:func:`.frozen`).
        batches: Re-iterable of batches.
        spec: How they are read, and where perturbations are added.
        cache_bytes: Batches are kept in memory up to this size, and read again in every pass beyond it; logits of a
            pass likewise, and computed again. None: what is free decides, see :class:`.KeptBatches`.
        keep_batches: Whether there is to be another pass over the same batches.
        progress: Called after every batch with what is being done and the number of batches done in this pass.
        ranks: The ranks that share the set; ``batches`` are this one's part, and may be none.

    Raises:
        TypeError: If ``batches`` are none, or can be read once only.
        ValueError: If there is no such submodule.
    """

    def __init__(
        self,
        network: Network,
        batches: Batches,
        spec: Spec,
        *,
        cache_bytes: int | None,
        keep_batches: bool = False,
        progress: Progress | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        check_batches(batches)
        self.network = network
        self.batches = batches
        self.spec = spec
        self.site = PerturbationSite(network, spec.perturb_at)
        self.most_of_logits = most_of_logits(cache_bytes)
        self.progress = progress
        self.ranks = ranks
        self.passes = 0
        self.first: tuple[Inputs, Tensor] | None = None
        self._size: int | None = None
        module = module_of(network)
        self.device = None if module is None else next((p.device for p in module.parameters()), None)
        # A list on the network's device is in memory as it is.
        at_hand = isinstance(batches, list | tuple) and self.device in (None, torch.device("cpu"))
        self._kept = KeptBatches(cache_bytes if keep_batches and not at_hand else 0, ranks.size)

    def read(self, what: str) -> Iterator[tuple[Inputs, Tensor]]:
        """One pass over the batches that are not empty, on the network's device; ``what`` is shown as progress.

        Whoever changes one in place takes a copy.

        Raises:
            ValueError: At its end, if it had another number of samples than the first.
        """
        self.passes += 1
        size = 0
        for index, (inputs, target) in enumerate(self._pairs()):
            size += n_items(inputs)
            if n_items(inputs):
                self.first = self.first or (inputs, target)
                yield inputs, target
            if self.progress is not None:
                self.progress(what, index + 1)
        self._size = size if self._size is None else self._size
        if size != self._size:
            raise ValueError(
                f"The calibration set gave {self._size} samples when it was read first, and now {size}: it is read "
                "several times, so every pass must start anew and give the same samples."
            )

    def _pairs(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Inputs and targets: out of memory once a pass has kept them all, else read."""
        if self._kept.is_complete:
            yield from self._kept
            return
        self._kept.start()
        for batch in self.batches:
            inputs, target = self.spec.pair(batch)
            inputs, target = map_tensors(inputs, lambda value: value.to(self.device)), target.to(self.device)
            self._kept.add(inputs, target)
            yield inputs, target
        self._kept.complete()

    def rows(self, logits: Tensor, target: Tensor) -> Rows:
        """Lay one batch out as rows."""
        return self.spec.rows(logits, target)

    def perturbed_logits(self, inputs: Inputs, perturbation: Tensor | None) -> Tensor:
        """Logits of one batch, perturbed where perturbations enter; the mean over its views."""
        return self._with_views(inputs, lambda value: shifted(value, perturbation))[0]

    def bare_logits(self, inputs: Inputs) -> Tensor:
        """Logits of one batch as the network returns them, without views."""
        return self._logits(inputs, lambda value: value)

    def observed(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of one batch, with and without views, and what a perturbation would be added to.

        That is None if there is no one such tensor.
        """
        seen: list[Tensor] = []

        def look(value: Tensor) -> Tensor:
            seen.append(value.detach())
            return value.clone()

        logits, bare = self._with_views(inputs, look)
        return logits, bare, seen[0] if seen else None

    def tracked(self, inputs: Inputs, perturbation: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of one batch, and a tensor of zeros, added to the perturbed one, that they can be differentiated in.

        One and the same is added to every view, as a perturbation is.
        """
        zeros: list[Tensor] = []

        def track(value: Tensor) -> Tensor:
            moved = shifted(value, perturbation).detach()
            if not zeros:
                zeros.append(torch.zeros_like(moved).requires_grad_())
            return moved + zeros[0]

        logits, _ = self._with_views(inputs, track)
        return logits, zeros[0]

    def _with_views(self, inputs: Inputs, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of one batch, the mean over its views; and those without views."""
        bare = self._logits(inputs, change)
        return self.spec.mean_over_views(bare, inputs, lambda view: self._logits(view, change)), bare

    def _logits(self, inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of one batch; says what to do if the network does not return one row of them per input."""
        # Of a copy: a network that changes its input in place must find it as it was in the next pass.
        logits = logits_of(self.site.run(copied(inputs), change))
        if len(logits.shape[:1]) == 0 or len(logits) != n_items(inputs):
            raise ValueError(
                f"The network returned logits of shape {tuple(logits.shape)} for a batch of {n_items(inputs)} inputs: "
                "the first axis must be that of the batch (a `squeeze` loses it when a batch has one item)."
            )
        return logits

    def forward(self, perturbation: Tensor | None, what: str, *, bare: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """One forward pass without gradients: logits and target, batch by batch; ``bare`` for those without views."""
        for inputs, target in self.read(what):
            # Not around the yield: whoever reads two such passes side by side would leave it on.
            with torch.no_grad():
                logits = self.bare_logits(inputs) if bare else self.perturbed_logits(inputs, perturbation)
            yield logits, target


class Logits:
    """The network's logits at one perturbation: kept where they fit, recomputed where they do not.

    Args:
        data: Network and batches.
        perturbation: The point in input space, None for the origin.
        recompute: Keep nothing; for a point that no pass has been made at.
        bare: Those without views.
    """

    def __init__(
        self, data: CalibrationSet, perturbation: Tensor | None, *, recompute: bool = False, bare: bool = False
    ) -> None:
        self.data = data
        self.perturbation = perturbation
        self.bare = bare
        self._kept: list[tuple[Tensor, Tensor]] | None = None if recompute else []
        self._rows: list[Rows] = []
        self._bytes = 0

    @property
    def ranks(self) -> Ranks:
        """The ranks that share the logits."""
        return self.data.ranks

    @property
    def are_kept(self) -> bool:
        """Whether all ranks have them in memory, so that reading them again costs no forward pass."""
        return all(self.ranks.gather(self._kept is not None))

    def keep(self, logits: Tensor, target: Tensor) -> None:
        """Remember a batch; past the limit all are forgotten."""
        self._bytes += logits.nbytes + target.nbytes
        if self._bytes > self.data.most_of_logits:
            self._kept = None
        elif self._kept is not None:
            self._kept.append((logits.detach().clone(), target.clone()))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits as the network returned them, with their target; in few large batches where they are kept."""
        if self._kept is not None:
            self._kept = list(merged_batches(self._kept))
            yield from self._kept
        else:
            yield from self.data.forward(self.perturbation, "logits", bare=self.bare)

    def __iter__(self) -> Iterator[Rows]:
        """Yield the rows, logits as float64: batch by batch, or in few large blocks where they are kept."""
        if self._kept is None:
            yield from self._doubled()
            return
        if not self._rows:
            self._rows = list(merged(self._doubled()))
        yield from self._rows

    def _doubled(self) -> Iterator[Rows]:
        for logits, target in self.batches():
            yield self.data.rows(logits, target).doubled()
