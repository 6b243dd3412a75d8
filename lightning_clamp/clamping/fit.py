"""The public engine: one call that looks at the data, runs a method, and never returns anything worse."""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import Unpack

from lightning_clamp._batch import BatchKeys, check_batch_keys
from lightning_clamp._rows import TASKS, Task
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.frozen import frozen, module_of
from lightning_clamp.clamping.options import MethodOptions
from lightning_clamp.clamping.outcome import MethodOutcome
from lightning_clamp.clamping.output_map import OUTPUT_MAPS
from lightning_clamp.clamping.passes import Batches, CalibrationSet, Logits, Network, Progress, summed
from lightning_clamp.clamping.published import fit_published
from lightning_clamp.clamping.ranks import Ranks
from lightning_clamp.clamping.result import CalibrationResult, Method
from lightning_clamp.clamping.selection import choose_clamp
from lightning_clamp.clamping.summary import DatasetSummary, summarize
from lightning_clamp.clamping.temperature import NO_TEMPERATURE, TemperatureFit, fit_temperature
from lightning_clamp.metrics.bootstrap import BlockSums, BootstrapSums, paired_bootstrap


def fit_clamp(
    network: Network,
    batches: Batches,
    *,
    method: Method = "clamp",
    task: Task = "multiclass",
    ignore_index: int | None = None,
    batch_keys: BatchKeys | None = None,
    perturb_at: str | None = None,
    cache_bytes: int = 2**28,
    progress: Progress | None = None,
    process_group: ProcessGroup | None = None,
    **options: Unpack[MethodOptions],
) -> CalibrationResult:
    r"""Fit a clamp to a frozen network.

    Args:
        network: Callable from a batch of inputs, ``(N, *shape)``, to logits: ``(N, C)``, dense ``(N, C, ...)``, or one
            logit per position for ``task="binary"``; or to an object with ``.logits``, or a mapping with ``"logits"``
            or ``"out"``. An ``nn.Module`` is put in eval mode and frozen meanwhile, its
            flags, buffers and the random state are restored, and batches are moved to its device. Pass the module (or
            one of its methods) and not a lambda around it: what is inside a function cannot be frozen.
        batches: Re-iterable of pairs ``(inputs, target)``, such as a DataLoader (or see ``batch_keys``); held-out data,
            not augmented.
        method: ``"clamp"`` (smooth perturbations by Fisher scoring and output maps, chosen by a criterion),
            ``"published"`` (Neural Clamping as published) or ``"temperature"`` (T alone).
        task: ``"multiclass"`` (softmax) or ``"binary"`` (one logit, sigmoid).
        ignore_index: Target value of positions to leave out.
        batch_keys: Which entries of a batch are input and target, where batches are no pairs: keys of a mapping, names
            of attributes, or positions, such as ``("image", "label")`` or ``(0, 2)``. The input may be a list of names:
            those entries are passed to the network as keyword arguments.
        perturb_at: Name of the submodule at whose input δ is added, such as the one that is fed a language model's
            embeddings; it must be called once in a forward. Sequences ``(N, length, features)`` that enter there get
            one value per feature. None for the network's own input, which must then be one tensor of floats.
        cache_bytes: Logits of a pass are kept up to this size; beyond it they are recomputed.
        progress: Called after every batch with what is being done and how many batches of this pass are done.
        process_group: Ranks that fit one clamp together, such as ``torch.distributed.group.WORLD``: each calls this
            with its own part of the set (of any size, no sample twice) and gets the same clamp as one process with all
            of it, up to rounding. Buffers are those of the group's first rank meanwhile. Not for ``"published"``.
        **options: Of the method: see :func:`~.selection.choose_clamp` (``grids``, ``output_maps``, ``max_passes``) and
            :func:`~.sgd.fit_published` (``epochs``, ``lr``, ``gamma``, …).

    Returns:
        The clamp with everything that led to it. If calibration would not lower the NLL of the calibration set, the
        clamp is the identity, and a warning says so.

    Raises:
        TypeError: If batches are no pairs of tensors, labels have no integer dtype, or an option is unknown.
        ValueError: If the set is empty or has fewer than 10 samples, a logit is not finite, a label is out of range,
            or the network returns probabilities.
        RuntimeError: If the output carries no gradient to the input and a perturbation was asked for; if another rank
            of the process group failed, with its error in words.

    Example:
        >>> logits = torch.randn(2000, 5)
        >>> target = torch.distributions.Categorical(logits=logits).sample()
        >>> result = fit_clamp(lambda x: 3 * x, [(logits, target)], method="temperature")
        >>> 2.5 < float(result.clamp.temperature) < 3.5
        True
    """
    ranks = Ranks(process_group)
    check_options(method, task, options, n_ranks=ranks.size)
    check_batch_keys(batch_keys)
    started = time.perf_counter()
    data = CalibrationSet(
        network,
        batches,
        task=task,
        ignore_index=ignore_index,
        batch_keys=batch_keys,
        perturb_at=perturb_at,
        cache_bytes=cache_bytes,
        progress=progress,
        ranks=ranks,
    )
    with frozen(network):
        if (module := module_of(network)) is not None:
            ranks.broadcast_buffers(module)
        summary = summarize(data)
        scores_before = _scores(Clamp(), summary.logits, data)
        before = scores_before.metrics
        _warn_of_training_data(before, ranks)
        fit = _solved(method, data, summary, options)
        scores_after = _scores(fit.clamp, fit.logits, data)
        after = scores_after.metrics
    if not fit.clamp.is_identity and not after["nll"] < before["nll"]:
        worse = (
            f"the clamp had an NLL of {after['nll']:.6g} on the calibration set, against {before['nll']:.6g} without"
        )
        fit = MethodOutcome(Clamp(), summary.logits, worse, fit.candidates, None, fit.history)
        after, scores_after = before, scores_before
    if fit.clamp.is_identity:
        ranks.warn(f"The network was left as it is: {fit.reason}.", stacklevel=2)
    return CalibrationResult(
        clamp=fit.clamp,
        method=method,
        before=before,
        after=after,
        change=paired_bootstrap(scores_before, scores_after),
        reliability=(scores_before.curve, scores_after.curve),
        candidates=fit.candidates,
        chosen=fit.chosen,
        reason=fit.reason,
        history=fit.history,
        n_samples=summary.n_samples,
        passes=data.passes,
        seconds=time.perf_counter() - started,
    )


def _fit_temperature_alone(data: CalibrationSet, summary: DatasetSummary, base: TemperatureFit) -> MethodOutcome:
    if not base.interior:
        return MethodOutcome(Clamp(), summary.logits, NO_TEMPERATURE)
    clamp = Clamp(log_temperature=torch.tensor(base.log_temperature, dtype=summary.parameter_dtype))
    return MethodOutcome(clamp, summary.logits, "temperature scaling, as asked")


_METHODS: dict[Method, Callable[..., MethodOutcome]] = {
    "clamp": choose_clamp,
    "published": fit_published,
    "temperature": _fit_temperature_alone,
}


def check_options(method: Method, task: Task, options: Mapping[str, Any], *, n_ranks: int = 1) -> None:
    """Refuse unknown solvers, tasks and options, and option values that cannot be, before any work is done."""
    if method not in _METHODS:
        raise ValueError(f"`method` must be one of {tuple(_METHODS)}, got {method!r}.")
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {TASKS}, got {task!r}.")
    if method == "published" and n_ranks > 1:
        raise ValueError(
            f'method="published" takes a step after every batch, so {n_ranks} ranks with a part of the set each would not do '
            "what the published method does: run it on one device."
        )
    parameters = inspect.signature(_METHODS[method]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    if unknown := set(options) - set(known):
        raise TypeError(
            f"method={method!r} has no option {', '.join(sorted(unknown))}; it has {', '.join(known) or 'none'}."
        )
    for name, right, must in _CHECKS:
        if name in options and not right(options[name]):
            raise ValueError(f"`{name}` must be {must}, got {options[name]!r}.")


def _sequence_of(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(right(item) for item in value)


def _at_least_1(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


# Option, what it must fulfil, and the same in words.
_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("grids", _sequence_of(_at_least_1), "a sequence of whole numbers of at least 1"),
    ("output_maps", _sequence_of(lambda value: value in OUTPUT_MAPS), f"a sequence of names among {OUTPUT_MAPS}"),
    ("max_passes", _at_least_1, "a whole number of at least 1"),
    ("epochs", _at_least_1, "a whole number of at least 1"),
    ("lr", lambda value: value > 0, "positive"),
    ("gamma", lambda value: value is None or value >= 0, "at least 0, or None for the cross-entropy"),
    ("dropout", lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ("initial_temperature", lambda value: value > 0, "positive"),
    ("optimizer", lambda value: value in ("sgd", "adamw"), "'sgd' or 'adamw'"),
    (
        "initial",
        lambda value: isinstance(value, torch.Tensor) or value in ("random", "data-driven"),
        "'random', 'data-driven' or a tensor",
    ),
)


def _solved(method: Method, data: CalibrationSet, summary: DatasetSummary, options: Mapping[str, Any]) -> MethodOutcome:
    return _METHODS[method](data, summary, fit_temperature(summary.logits), **options)


def _scores(clamp: Clamp, logits: Logits, data: CalibrationSet) -> BlockSums:
    """What the metrics are computed from, of the clamped logits, through the clamp itself."""
    ranks = data.ranks
    metric = BootstrapSums(
        task=data.task,
        ignore_index=data.ignore_index,
        validate_args=False,
        rank=ranks.rank,
        world_size=ranks.size,
    )

    def parts() -> Iterator[tuple[Tensor, ...]]:
        for batch, target in logits.batches():
            scaled = clamp.scale(batch)
            metric.to(scaled.device).update(scaled, target)
        yield (metric.sums,)

    return BlockSums(*summed(parts(), [metric.sums.shape], ranks))


def _warn_of_training_data(before: Mapping[str, float], ranks: Ranks) -> None:
    if before["accuracy"] > 0.998 and before["nll"] < 0.02:
        ranks.warn(
            f"The calibration set has accuracy {before['accuracy']:.4f} and NLL {before['nll']:.4f}: is it the "
            "training set? Calibrate on held-out data, or the confidences will be those of memory.",
            stacklevel=3,
        )
