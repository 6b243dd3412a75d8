"""What the Trainer runs on: which strategies a calibration can use, the ranks it has there, and dry runs."""

import atexit
import multiprocessing

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import distributed as dist

from lightning_clamp.clamping.options import Plan
from lightning_clamp.clamping.ranks import ALONE, Ranks


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that do not hold the whole network on every device.

    Raises:
        MisconfigurationException: If the Trainer has one of those.
    """
    strategy = trainer.strategy
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and strategy.root_device.type != "xla"
    if not whole or isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"NeuralClamping calls the network on every device by itself, which {type(strategy).__name__} does not "
            "allow: train without the callback and save; then run lightning_clamp.calibrate(Trainer(devices=1), model, "
            "dataloader) on the model, loaded from the consolidated checkpoint. One device and "
            "strategy='ddp' work with the callback."
        )


def check_float64(trainer: Trainer) -> None:
    """Refuse devices that cannot sum in float64.

    Raises:
        MisconfigurationException: On Apple's MPS.
    """
    if trainer.strategy.root_device.type == "mps":
        raise MisconfigurationException(
            "NeuralClamping sums in float64, which MPS does not have: use Trainer(accelerator='cpu'), or train without "
            "it and run lightning_clamp.calibrate(Trainer(accelerator='cpu'), model, dataloader)."
        )


def check_method(trainer: Trainer, plan: Plan) -> None:
    """Refuse a method that several ranks cannot share.

    Raises:
        MisconfigurationException: If it is, and there are several.
    """
    try:
        plan.check_ranks(trainer.world_size)
    except ValueError as error:
        raise MisconfigurationException(f"{error} Here that is Trainer(devices=1).") from None


def take_group_down_at_exit() -> None:
    """Let a process that Lightning spawned end in order, once it has something to leave behind.

    One that exits with gloo's threads running is aborted now and then ("terminate called without an active exception"),
    and the parent then raises after all was done. Lightning takes the group down at exit for NCCL alone.
    """
    if multiprocessing.parent_process() is not None:
        atexit.unregister(_take_group_down)
        atexit.register(_take_group_down)


def _take_group_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_dry_run(trainer: Trainer) -> bool:
    """Whether the Trainer only tries everything once (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))


def ranks_of(trainer: Trainer) -> Ranks:
    """The ranks of a running Trainer, which share the calibration set."""
    return Ranks(dist.group.WORLD) if trainer.world_size > 1 else ALONE
