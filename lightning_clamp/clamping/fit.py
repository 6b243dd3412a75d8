"""The public engine: one call that looks at the data, runs a method, and never returns anything worse."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import Unpack

from lightning_clamp._checks import check_made, counted
from lightning_clamp.clamping.by_label import LabelMetrics
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.frozen import frozen, module_of
from lightning_clamp.clamping.kept import check_cache_bytes
from lightning_clamp.clamping.options import ClampKeywords, Method, Plan, TemperatureOptions, make_plan
from lightning_clamp.clamping.outcome import MethodOutcome
from lightning_clamp.clamping.passes import Batches, CalibrationSet, Logits, Network, Progress, summed
from lightning_clamp.clamping.published import fit_published
from lightning_clamp.clamping.ranks import Ranks
from lightning_clamp.clamping.result import CalibrationResult
from lightning_clamp.clamping.selection import choose_clamp
from lightning_clamp.clamping.summary import DatasetSummary, summarize
from lightning_clamp.clamping.temperature import NO_TEMPERATURE, TemperatureFit, fit_temperature
from lightning_clamp.metrics.bootstrap import BlockSums, BootstrapSums, paired_bootstrap
from lightning_clamp.spec import Spec

# Share of the NLL of equal probabilities that is left where outputs say next to nothing.
_SAYS_NOTHING = 0.95
# Nats per row that are not worth a word.
_NOTHING = 1e-4
# Blocks of samples that intervals are drawn from, in all; of many labels each has fewer, but not below the second.
_BLOCKS, _FEWEST_BLOCKS = 2**15, 64


def fit_clamp(
    network: Network,
    dataloader: Batches,
    *,
    method: Method = "clamp",
    cache_bytes: int | None = None,
    progress: Progress | None = None,
    process_group: ProcessGroup | None = None,
    **keywords: Unpack[ClampKeywords],
) -> CalibrationResult:
    r"""Fit a clamp to a frozen network.

    Args:
        network: Callable from a batch of inputs, ``(N, *shape)``, to logits: ``(N, C)``, dense ``(N, C, ...)``, or one
            logit per position for ``task="binary"`` and per label for ``task="multilabel"``; or to an object with
            ``.logits``, or a mapping with ``"logits"`` or ``"out"``. An ``nn.Module`` is put in eval mode and frozen
            meanwhile, its flags, buffers and the random state are restored, and batches are moved to its device. Pass
            the module (or one of its methods) and not a lambda around it: what is inside a function cannot be frozen.
        dataloader: Re-iterable of pairs ``(inputs, target)``, such as a DataLoader (or see ``batch_keys``); held-out
            data, not augmented. Read once, if there is room for the batches.
        method: ``"clamp"`` (smooth perturbations by Fisher scoring and output maps, chosen by a criterion),
            ``"published"`` (Neural Clamping as published) or ``"temperature"`` (T alone).
        cache_bytes: Batches are kept in memory up to this size, and read again in every pass beyond it; the logits of a
            pass likewise, and computed again. None: for batches a quarter of what is free on the network's device, and
            then a quarter of the host's free memory; for logits 256 MB.
        progress: Called after every batch with what is being done and how many batches of this pass are done.
        process_group: Ranks that fit one clamp together, such as ``torch.distributed.group.WORLD``: each calls this
            with its own part of the set (of any size, no sample twice) and gets the same clamp as one process with all
            of it, up to rounding. Buffers are those of the group's first rank meanwhile. Not for ``"published"``.
        **keywords: The settings of :class:`~lightning_clamp.spec.Spec` (``task``, ``ignore_index``, ``batch_keys``,
            ``perturb_at``, ``views``), and the options of the method: :class:`~.options.ClampOptions` (``grids``,
            ``output_maps``, ``max_passes``) or :class:`~.options.PublishedOptions` (``epochs``, ``lr``, …).

    Returns:
        The clamp with everything that led to it. If calibration would not lower the NLL of the calibration set, the
        clamp is the identity, and a warning says so.

    Raises:
        TypeError: If batches are no pairs of tensors, labels have no integer dtype, or a keyword is unknown.
        ValueError: If a setting or an option has no such value, the set is empty or has fewer than 10 samples, a logit
            is not finite, a label is out of range, or the network returns probabilities.
        RuntimeError: If ``method="published"`` finds no gradient to the input (other methods leave the input alone
            then); if another rank of the process group failed, with its error in words.

    Example:
        >>> logits = torch.randn(2000, 5)
        >>> target = torch.distributions.Categorical(logits=logits).sample()
        >>> result = fit_clamp(lambda x: 3 * x, [(logits, target)], method="temperature")
        >>> 2.5 < float(result.clamp.temperature) < 3.5
        True
    """
    ranks = Ranks(process_group)
    with ranks.raise_together():
        plan = make_plan(method, keywords, fit_clamp)
        check_cache_bytes(cache_bytes)
    return fit_by_plan(network, dataloader, plan, cache_bytes=cache_bytes, progress=progress, ranks=ranks)


def fit_by_plan(
    network: Network,
    batches: Batches,
    plan: Plan,
    *,
    cache_bytes: int | None,
    progress: Progress | None,
    ranks: Ranks,
) -> CalibrationResult:
    """:func:`fit_clamp` with its keywords sorted."""
    started = time.perf_counter()
    with ranks.raise_together():
        check_made(network)
        plan.check_ranks(ranks.size)
        data = CalibrationSet(
            network,
            batches,
            plan.spec,
            cache_bytes=cache_bytes,
            keep_batches=plan.options.reads_again,
            progress=progress,
            ranks=ranks,
        )
    ranks.check_equal({"method": plan.method, **vars(plan.options), **vars(plan.spec)})
    with frozen(network):
        if (module := module_of(network)) is not None:
            ranks.broadcast_buffers(module)
        summary = summarize(data)
        sums_before = _metric_sums(Clamp(), summary.bare_logits, data, summary.n_labels)
        before = sums_before.metrics
        _warn_of_training_data(before, ranks)
        base = fit_temperature(summary.logits)
        _warn_of_views(base, summary, ranks)
        outcome = _METHODS[plan.method](data, summary, base, plan.options)
        sums_after = _metric_sums(outcome.clamp, outcome.logits, data, summary.n_labels)
        after = sums_after.metrics
        _warn_of_no_information(base, after["nll"], ranks)
    if not outcome.clamp.is_identity and not after["nll"] < before["nll"]:
        worse = (
            f"the clamp had an NLL of {after['nll']:.6g} on the calibration set, against {before['nll']:.6g} without"
        )
        outcome = replace(outcome, clamp=Clamp(), logits=summary.bare_logits, reason=worse, chosen=None)
    spec = plan.spec
    if outcome.clamp.is_identity:
        # Nothing is done to the network then, nor is it asked for other views.
        after, sums_after, spec = before, sums_before, replace(spec, views=())
        ranks.warn(f"The network was left as it is: {outcome.reason}.", stacklevel=3)
    return CalibrationResult(
        clamp=outcome.clamp,
        method=plan.method,
        spec=spec,
        before=before,
        after=after,
        change=paired_bootstrap(sums_before, sums_after),
        reliability=(sums_before.curve, sums_after.curve),
        candidates=outcome.candidates,
        chosen=outcome.chosen,
        reason=outcome.reason + _of_views(spec),
        history=outcome.history,
        n_samples=summary.n_samples,
        passes=data.passes,
        seconds=time.perf_counter() - started,
        by_label=LabelMetrics.from_sums(sums_before, sums_after) if summary.n_labels else None,
    )


def _fit_temperature_alone(
    data: CalibrationSet, summary: DatasetSummary, base: TemperatureFit, options: TemperatureOptions
) -> MethodOutcome:
    if not base.determined:
        return MethodOutcome(Clamp(), summary.logits, NO_TEMPERATURE)
    clamp = Clamp(log_temperature=torch.tensor(base.log_temperature, dtype=summary.parameter_dtype))
    return MethodOutcome(clamp, summary.logits, "temperature scaling, as asked")


_METHODS: dict[Method, Callable[[CalibrationSet, DatasetSummary, TemperatureFit, Any], MethodOutcome]] = {
    "clamp": choose_clamp,
    "published": fit_published,
    "temperature": _fit_temperature_alone,
}


def _metric_sums(clamp: Clamp, logits: Logits, data: CalibrationSet, n_labels: int) -> BlockSums:
    """What the metrics are computed from, of the clamped logits, through the clamp itself."""
    ranks = data.ranks
    n_blocks = min(1024, max(_FEWEST_BLOCKS, _BLOCKS // max(n_labels, 1)))
    options = data.spec.of_means(n_labels)
    metric = BootstrapSums(n_blocks=n_blocks, **options, validate_args=False, rank=ranks.rank, world_size=ranks.size)

    def batch_sums() -> Iterator[tuple[Tensor, ...]]:
        for batch, target in logits.batches():
            scaled = clamp.scale(batch)
            metric.to(scaled.device).update(scaled, target)
        yield (metric.sums,)

    return BlockSums(*summed(batch_sums(), [metric.sums.shape], ranks))


def _of_views(spec: Spec) -> str:
    return f"; mean of {counted(spec.n_views, 'view')} (as it is, {', '.join(spec.views)})" if spec.views else ""


def _warn_of_no_information(base: TemperatureFit, after: float, ranks: Ranks) -> None:
    if not base.informed and after > _SAYS_NOTHING * base.nll:
        ranks.warn(
            f"The outputs say next to nothing of the labels: their NLL is {after:.4f} at best, and that of classes "
            f"which are all equally likely is {base.nll:.4f}; check that inputs and labels belong together.",
            stacklevel=3,
        )


def _warn_of_views(base: TemperatureFit, summary: DatasetSummary, ranks: Ranks) -> None:
    """Say so if views do harm, as they do where a mirror image has another label."""
    if summary.bare_logits is summary.logits or not summary.bare_logits.are_kept:
        return
    without = fit_temperature(summary.bare_logits)
    if base.nll > without.nll + _NOTHING:
        ranks.warn(
            f"Views do harm here: at the best temperature the NLL of the calibration set is {base.nll:.4f} with them "
            f"and {without.nll:.4f} without: leave `views` out; does an image keep its label when it is turned round?",
            stacklevel=3,
        )


def _warn_of_training_data(before: Mapping[str, float], ranks: Ranks) -> None:
    if before["accuracy"] > 0.998 and before["nll"] < 0.02:
        ranks.warn(
            f"The calibration set has accuracy {before['accuracy']:.4f} and NLL {before['nll']:.4f}: is it the "
            "training set? Calibrate on held-out data, or the confidences will be those of memory.",
            stacklevel=3,
        )
