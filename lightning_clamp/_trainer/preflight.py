"""One try of the network before training: what will still be wrong when it has ended is found out now."""

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from lightning_clamp._batch import n_items
from lightning_clamp._trainer.data import CalibrationBatches, as_validation
from lightning_clamp._trainer.devices import ranks_of
from lightning_clamp._trainer.run import TrainedNetwork
from lightning_clamp._trainer.steady import warn_if_unsteady
from lightning_clamp.clamping.eligible import eligible_grids
from lightning_clamp.clamping.frozen import frozen
from lightning_clamp.clamping.gradient import gradient_problem
from lightning_clamp.clamping.options import ClampOptions, Plan, PublishedOptions
from lightning_clamp.clamping.passes import CalibrationSet
from lightning_clamp.clamping.published import check_differentiable, check_inputs
from lightning_clamp.clamping.ranks import Ranks
from lightning_clamp.clamping.site import submodule
from lightning_clamp.clamping.summary import DatasetSummary, check_size, summarize

# More samples than any grid needs: how many there are is not asked of a try.
_ENOUGH = 2**60


def check_forward(module: LightningModule) -> None:
    """Refuse a module that cannot be called.

    Raises:
        MisconfigurationException: If it has no ``forward``.
    """
    if not is_overridden("forward", module, LightningModule):
        raise MisconfigurationException(
            f"{type(module).__name__} has no forward, and a calibration calls the model on the inputs alone: define "
            "forward(self, x) that returns the logits, and call self(x) in its steps."
        )


def check_site(module: LightningModule, perturb_at: str) -> None:
    """Refuse a name that no submodule has.

    Raises:
        MisconfigurationException: If there is no such submodule.
    """
    try:
        submodule(module, perturb_at)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from None


def try_network(trainer: Trainer, module: LightningModule, batches: CalibrationBatches, plan: Plan) -> None:
    """Do once, with the first calibration batch, what a calibration will do: forward, and backward to the input.

    The network is left as it was, and the random state too. A network with parameters that are made in its first
    forward is left alone.

    Args:
        trainer: Running, on all ranks.
        module: Not trained yet.
        batches: The calibration set; its first batches are let go of.
        plan: What is to be done at the end.

    Raises:
        ValueError: If the outputs do not fit the labels or the settings, or the set is too small.
        TypeError: If the outputs, or the inputs of the published method, are of another kind.
        RuntimeError: If the network fails; if another rank failed, with its error in words.
    """
    firsts, batches.firsts = batches.firsts, []
    ranks, network = ranks_of(trainer), TrainedNetwork(trainer, module)
    if any(map(is_lazy, [*module.parameters(), *module.buffers()])):
        rank_zero_info(
            "NeuralClamping does not try the network before training: its first forward is to make some of its "
            "parameters."
        )
        return
    if not any(ranks.gather(any(n_items(plan.spec.pair(batch)[0]) for batch in firsts))):
        rank_zero_info("NeuralClamping does not try the network before training: the first batch is empty.")
        return
    counts = [count for count in ranks.gather(_n_samples(batches, firsts, ranks)) if count is not None]
    if len(counts) == ranks.size:
        check_size(sum(counts), sum(counts))
    data = CalibrationSet(network, firsts, plan.spec, cache_bytes=0, ranks=ranks)
    # What a Trainer compiles would be compiled once more for a frozen network.
    with as_validation(trainer), _as_at_the_end(module), frozen(network), torch.compiler.set_stance("force_eager"):
        summary = summarize(data, trial=True)
        warn_if_unsteady(data)
        _try_gradient(data, summary, plan)


@contextmanager
def _as_at_the_end(module: LightningModule) -> Iterator[None]:
    """Have ``self.log`` refused, as it will be: now it would take the try for a part of the training."""
    # Private, and the hook that `self.log` takes itself to be called from. A test holds it.
    hook, module._current_fx_name = module._current_fx_name, "on_train_end"  # noqa: SLF001
    try:
        yield
    finally:
        module._current_fx_name = hook  # noqa: SLF001


def _try_gradient(data: CalibrationSet, summary: DatasetSummary, plan: Plan) -> None:
    """Differentiate in the input where the method would: refuse what cannot do without, and say what will."""
    if isinstance(plan.options, PublishedOptions):
        check_inputs(summary, plan.options)
        check_differentiable(data)
    elif isinstance(plan.options, ClampOptions):
        grids, _ = eligible_grids(plan.options.grids, summary._replace(n_samples=_ENOUGH))
        if grids and (problem := gradient_problem(data)) is not None:
            rank_zero_warn(
                f"NeuralClamping will calibrate the outputs alone, without a perturbation: {problem}. Say grids=() if "
                "that is how it should be."
            )


def _n_samples(batches: CalibrationBatches, firsts: list[Any], ranks: Ranks) -> int | None:
    """How many samples this rank will read; None where that cannot be known without reading them."""
    if ranks.size == 1 and batches.n_batches == len(firsts):
        return sum(n_items(batches.spec.pair(batch)[0]) for batch in firsts)
    counts = [_length(shard.loader) for shard in batches.shards]
    known = [count for count in counts if count is not None]
    # How many of them a limit leaves, depends on the batches.
    return sum(known) if len(known) == len(counts) and batches.limit is None else None


def _length(loader: Iterable[Any]) -> int | None:
    """Samples of a loader, as far as its sampler knows them."""
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return None
    length = sized_len(loader.sampler)
    return length - length % loader.batch_size if length is not None and loader.drop_last else length


# Loaders


@contextmanager
def kept_loaders(loaders: Iterable[Any]) -> Iterator[None]:
    """Have loaders as they were after: their samplers, generators, and the workers that stay.

    A training that shares one of them with the calibration, as validation does, is then the same as without.
    """
    with ExitStack() as restored:
        for loader in loaders:
            for part in _parts(loader, "sampler", "batch_sampler"):
                restored.callback(vars(part).update, dict(vars(part)))
                _keep_generators(part, restored)
            for part in _parts(loader, "dataset"):
                _keep_generators(part, restored)
            if isinstance(loader, DataLoader):
                # Private, and where workers that stay (`persistent_workers`) are kept, who have a random state of
                # their own: others are started for now. A test holds it.
                loader._iterator = None  # noqa: SLF001
        yield


def _parts(owner: Any, *names: str) -> Iterator[Any]:
    """An object, and what it holds under these names, and that in turn."""
    if hasattr(owner, "__dict__"):
        yield owner
        for name in names:
            yield from _parts(vars(owner).get(name), *names)


def _keep_generators(owner: Any, restored: ExitStack) -> None:
    """Give the random generators that an object holds their state back in the end."""
    for value in vars(owner).values():
        if isinstance(value, torch.Generator):
            restored.callback(value.set_state, value.get_state())
        elif isinstance(value, np.random.Generator):
            restored.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, random.Random):
            restored.callback(value.setstate, value.getstate())
