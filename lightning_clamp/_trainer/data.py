"""Which loader is the calibration set, and its batches as the Trainer hands them out."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice, product
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_clamp._trainer.devices import is_dry_run, ranks_of
from lightning_clamp._trainer.overlap import n_shared
from lightning_clamp._trainer.shards import Shard
from lightning_clamp.clamping.frozen import kept_random_state
from lightning_clamp.clamping.passes import check_batches
from lightning_clamp.clamping.ranks import Ranks
from lightning_clamp.clamping.summary import MIN_SAMPLES
from lightning_clamp.spec import Spec

_HOOK = "calibration_dataloader"


class CalibrationSource(NamedTuple):
    """Where the calibration set comes from.

    Attributes:
        loader: Yields pairs ``(inputs, target)``.
        limit: Batches to read, None for all.
        is_validation: Whether it is the validation loader, for want of anything better.
    """

    loader: Any
    limit: int | None
    is_validation: bool = False


def find_calibration_set(trainer: Trainer, module: LightningModule, given: Any) -> CalibrationSource | None:
    """Find the calibration set, in this order, on all ranks.

    The loader given to the callback; the ``calibration_dataloader()`` of the datamodule, then of the module; the
    validation loader, of which as many batches are read as the Trainer validates on.

    Returns:
        The set; None where it will be a validation loader that the Trainer has not loaded yet, as it does late when the
        first epoch does not validate.

    Raises:
        MisconfigurationException: If there is none, or there are several validation loaders.
    """
    with ranks_of(trainer).raise_together():
        return _found(trainer, module, given)


def _found(trainer: Trainer, module: LightningModule, given: Any) -> CalibrationSource | None:
    # A dry run reads enough batches, of whatever size, to try the calibration.
    fast = MIN_SAMPLES if is_dry_run(trainer) else None
    if given is not None:
        return CalibrationSource(given, fast)
    if (source := _of_hook((_datamodule(trainer), module), fast)) is not None:
        return source
    if trainer.val_dataloaders is None and trainer.enable_validation:
        return None
    loader = _only(trainer.val_dataloaders)
    limit = trainer.num_val_batches[0] if trainer.num_val_batches else 0
    if loader is None or limit == 0:
        raise MisconfigurationException(
            "There is no calibration set: pass NeuralClamping(dataloaders=...), or give the datamodule a "
            "`calibration_dataloader()`, or the Trainer a validation loader."
        )
    return CalibrationSource(loader, None if limit == float("inf") else int(limit), is_validation=True)


def loaders_of(given: Any) -> list[Any]:
    """The loaders that a calibration set consists of: several in a list, a dict or a CombinedLoader, else the one."""
    if isinstance(given, CombinedLoader):
        return list(given.flattened)
    if isinstance(given, Mapping):
        return list(given.values())
    # Any other list is one loader, of batches.
    several = isinstance(given, list | tuple) and any(isinstance(part, DataLoader) for part in given)
    return list(given) if several else [given]


def given_calibration_set(given: Any, module: LightningModule) -> CalibrationSource:
    """The calibration set of a loader, or of a datamodule or, for None, a module of its own that have been set up.

    Raises:
        MisconfigurationException: If there is none, or there are several validation loaders.
    """
    if given is not None and not isinstance(given, LightningDataModule):
        return CalibrationSource(given, None)
    if (source := _of_hook((given, module), None)) is not None:
        return source
    for owner in (given, module):
        if owner is not None and is_overridden("val_dataloader", owner):
            return CalibrationSource(_only(owner.val_dataloader()), None, is_validation=True)
    raise MisconfigurationException(
        f"There is no calibration set: give {type(module if given is None else given).__name__} a "
        "`calibration_dataloader()` or a validation loader, or pass a loader."
    )


def _of_hook(owners: Iterable[Any], limit: int | None) -> CalibrationSource | None:
    """What the first of the owners that has the hook returns from it."""
    hook = next((hook for owner in owners if (hook := getattr(owner, _HOOK, None))), None)
    return None if hook is None else CalibrationSource(hook(), limit)


def _only(loaders: Any) -> Any:
    """The one validation loader, if it is one."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple) and len(loaders) == 1:
        (loaders,) = loaders
    if isinstance(loaders, list | tuple):
        raise MisconfigurationException(
            f"There are {len(loaders)} validation loaders, and which is the calibration set? Pass one, or a list of "
            "them, as `dataloaders`."
        )
    return loaders


def _datamodule(trainer: Trainer) -> LightningDataModule | None:
    # Public, but set by a connector where mypy does not look.
    datamodule: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule


def owner_of(
    hook: str, datamodule: LightningDataModule | None, module: LightningModule
) -> LightningDataModule | LightningModule:
    """Whose data hook counts, as in Lightning: the datamodule's if it overrides it, else the module's."""
    return datamodule if datamodule is not None and is_overridden(hook, datamodule) else module


def validation_batch(trainer: Trainer, module: LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """A batch of a loader as a validation step sees it: converted, changed by the transfer hooks, on the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    owner = owner_of("on_before_batch_transfer", _datamodule(trainer), module)
    batch = owner.on_before_batch_transfer(batch, dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def transferred(module: LightningModule, batch: Any) -> Any:
    """A batch as a Trainer would hand it to this module, without one: changed by its transfer hooks, on its device."""
    batch = module.on_before_batch_transfer(batch, 0)
    batch = module.transfer_batch_to_device(batch, module.device, 0)
    return module.on_after_batch_transfer(batch, 0)


@contextmanager
def as_validation(trainer: Trainer) -> Iterator[None]:
    """Have the Trainer validate for a while: transfer hooks that augment ask whether it is training."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage


def warn_if_training_data(loader: Any, trainer: Trainer) -> None:
    """Warn if the calibration set is, or overlaps with, the training set, as far as that is seen without reading it."""
    with ranks_of(trainer).raise_together():
        _warn_if_shared(loader, trainer)


def _warn_if_shared(loader: Any, trainer: Trainer) -> None:
    for calibration, training in product(loaders_of(loader), loaders_of(trainer.train_dataloader)):
        ours, theirs = _dataset(calibration), _dataset(training)
        if ours is theirs:
            shared = "is the training set itself"
        elif number := n_shared(ours, theirs):
            shared = f"shares {number} samples with the training set"
        else:
            continue
        rank_zero_warn(
            f"The calibration set {shared}: confidences will be fitted to memory. Hold some data out for calibration."
        )


def _dataset(loader: Any) -> Any:
    """What a loader reads from; itself, if it is a list of batches or no loader that says so."""
    return getattr(loader, "dataset", loader)


def _check(loader: Any) -> None:
    try:
        check_batches(loader)
    except TypeError as error:
        raise MisconfigurationException(str(error)) from error


class CalibrationBatches:
    """This rank's part of the calibration set as Lightning would hand it to a validation step: transfer hooks run.

    Reads the first batch, so that a set that cannot be used is refused before training and not after.

    Attributes:
        firsts: The first batch of every loader, on the device, for who tries the network before training.

    Raises:
        MisconfigurationException: If the set cannot be iterated again and again, is empty, or its batches are not what
            ``batch_keys`` says.
    """

    def __init__(
        self,
        source: CalibrationSource,
        trainer: Trainer,
        module: LightningModule,
        ranks: Ranks,
        spec: Spec,
    ) -> None:
        self.limit = source.limit
        self.trainer = trainer
        self.module = module
        self.spec = spec
        self.firsts: list[Any] = []
        with ranks.raise_together():
            loaders = loaders_of(source.loader)
            for loader in loaders:
                _check(loader)
        with kept_random_state(), as_validation(trainer):
            self.shards = [Shard(loader, ranks) for loader in loaders]
            self._check_first(ranks)

    @property
    def n_batches(self) -> int | None:
        """Number of batches; None for loaders that do not know it."""
        lengths = [shard.n_batches for shard in self.shards]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            return None
        return sum(known) if self.limit is None else min(self.limit, sum(known))

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches, on the device.

        Raises:
            MisconfigurationException: At the end, if a loader can be read once only.
        """
        batches = ((batch, index) for index, shard in enumerate(self.shards) for batch in shard)
        limited = islice(batches, self.limit)
        for batch, index in limited:
            yield validation_batch(self.trainer, self.module, batch, index)
        if self.limit is None:
            for shard in self.shards:
                shard.check_starts_anew()

    def _check_first(self, ranks: Ranks) -> None:
        firsts = [(shard.first, index) for index, shard in enumerate(self.shards) if shard.first is not None]
        with ranks.raise_together():
            try:
                self.firsts = [validation_batch(self.trainer, self.module, batch, index) for batch, index in firsts]
                for batch in self.firsts:
                    self.spec.pair(batch)
            except TypeError as error:
                raise MisconfigurationException(f"NeuralClamping cannot use the calibration set. {error}") from error
        if not any(ranks.gather(bool(firsts))):
            raise MisconfigurationException(
                "The calibration set is empty: pass a loader that yields at least one batch."
            )
