"""The command line: Lightning's commands with the clamp; ``calibrate``, ``check`` and ``report`` for checkpoints."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from textwrap import shorten
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.imports import RequirementCache

from lightning_clamp import __version__
from lightning_clamp._trainer.devices import check_method
from lightning_clamp.callback import NeuralClamping
from lightning_clamp.checkpoint import calibrated_path, check_resumable, read_checkpoint, read_result
from lightning_clamp.clamping.result import CalibrationResult
from lightning_clamp.module import CalibrationModule
from lightning_clamp.report import figures
from lightning_clamp.standalone import calibrate_by_plan

_PROGRAM = "lightning-clamp"
# What Lightning takes in place of a path.
_WORDS = ("best", "last", "hpc")
_JSONARGPARSE = "jsonargparse[signatures]>=4.39,<5"


def main(args: list[str] | None = None) -> None:
    """Run the command line, with ``sys.argv`` by default.

    Modules are found in the working directory, after all that is installed; ``report`` needs none and looks for none
    there. What a user can set right ends with a sentence and exit code 2; an exception of the user's own code keeps its
    traceback.

    Raises:
        SystemExit: After ``--help`` and the like; with code 2 if the arguments or the files they name will not do, or a
            ``fit`` ends without a calibrated model; with code 143 after SIGTERM.
    """
    args = sys.argv[1:] if args is None else args
    if args[:1] != ["report"] and os.getcwd() not in sys.path:
        # Not first: a file that lies beside a checkpoint must not take the place of an installed package.
        sys.path.append(os.getcwd())
    try:
        if not RequirementCache(_JSONARGPARSE):
            raise MisconfigurationException(
                f'The command line needs {_JSONARGPARSE}: pip install "lightning-clamp[cli]".'
            )
        if args[:1] == ["report"]:
            report(args[1:])
        else:
            ClampCLI(args)
    except MisconfigurationException as error:
        sys.stderr.write(f"{_PROGRAM}: error: {error}\n")
        raise SystemExit(2) from None
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None


class CalibratingTrainer(Trainer):
    """A Trainer that also calibrates checkpoints, with the options of its :class:`~lightning_clamp.NeuralClamping`."""

    @property
    def clamping(self) -> NeuralClamping:
        """The callback that is attached."""
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        (clamping,) = (callback for callback in callbacks if isinstance(callback, NeuralClamping))
        return clamping

    def calibrate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        save_to: bool | str | None = None,
        weights_only: bool | None = None,
    ) -> CalibrationModule:
        """Calibrate a checkpoint, and save it with its clamp.

        Args:
            model: Of the class that was trained; its weights are replaced by those of the checkpoint.
            datamodule: With a ``calibration_dataloader()``, or for want of it a validation loader; by default the
                model's own.
            ckpt_path: The checkpoint to calibrate.
            save_to: File (ending in ``.ckpt``) or folder to save the calibrated model in; true for beside the
                checkpoint, as ``NAME-calibrated.ckpt``, and false for nowhere. By default what ``calibration.save_to``
                says.
            weights_only: Without effect, so that the config of a fit will do: checkpoints are always loaded safely.

        Returns:
            The calibrated module, on the CPU.

        Raises:
            MisconfigurationException: If the checkpoint cannot be used, or there is no calibration set.
        """
        clamping = self.clamping
        load_weights(model, ckpt_path)
        plan, where = clamping.plan, clamping.save_to if save_to is None else save_to
        path = calibrated_path(where, Path(ckpt_path).parent, Path(ckpt_path).stem)
        return calibrate_by_plan(
            self, model, None, datamodule, plan, save_to=path or False, cache_bytes=clamping.cache_bytes
        )

    def check(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        fail_under: float | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Test on the test set whether a calibrated checkpoint still holds, and say so in a sentence.

        Args:
            model: Of the class that was trained; its weights are replaced by those of the checkpoint.
            datamodule: With a ``test_dataloader()``.
            ckpt_path: The calibrated checkpoint.
            fail_under: Exit with code 1 if the p-value ``calibrated/p`` is below this, such as 0.01.
            weights_only: Without effect, so that the config of a fit will do: checkpoints are always loaded safely.

        Raises:
            MisconfigurationException: If the checkpoint cannot be used or has no clamp, or there is no datamodule.
            SystemExit: With code 1, for ``fail_under``.
        """
        if datamodule is None:
            raise MisconfigurationException("`check` needs --data, a datamodule with a test_dataloader().")
        with _refusals(ckpt_path):
            result = read_result(ckpt_path)
        load_weights(model, ckpt_path)
        (numbers,) = self.test(CalibrationModule.from_result(model, result), datamodule=datamodule)
        if fail_under is not None and numbers.get("calibrated/p", 1.0) < fail_under:
            raise SystemExit(1)


def load_weights(model: LightningModule, path: str) -> None:
    """Put the weights of a checkpoint into a model, loading nothing but tensors and plain values.

    Raises:
        MisconfigurationException: If the file cannot be read, or is no checkpoint of such a model.
    """
    checkpoint = _checkpoint(path)
    model.configure_model()
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    except RuntimeError as error:
        raise MisconfigurationException(
            f"{path!r} is no checkpoint of this {type(model).__name__}: {shorten(str(error), 300)}"
        ) from error


def _checkpoint(path: str) -> dict[str, Any]:
    with _refusals(path):
        checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise MisconfigurationException(f"{path!r} is no checkpoint of Lightning: it has no state_dict.")
    return checkpoint


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Turn what is wrong with a file into a sentence."""
    try:
        yield
    except OSError as error:
        raise MisconfigurationException(f"{path!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


class SaveConfig(SaveConfigCallback):
    """Saves the config with the logs as ``config.yaml``, or where there is one already, as ``config-1.yaml`` and so on.

    Lightning's own stops the run instead, or overwrites what may have been written by hand: some loggers have no folder
    of their own, and then it is the working directory. Without a logger nothing is saved.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config."""
        if trainer.loggers and not self.already_saved:
            self.config_filename = trainer.strategy.broadcast(_free_name(trainer))
            super().setup(trainer, pl_module, stage)


def _free_name(trainer: Trainer) -> str:
    folder = trainer.log_dir or ""
    exists = get_filesystem(folder).exists
    names = chain(["config.yaml"], (f"config-{number}.yaml" for number in count(1)))
    return next(name for name in names if not exists(os.path.join(folder, name)))


class ClampParser(LightningArgumentParser):
    """Lightning's parser; the action that takes subcommands is kept, for those that are no methods of a Trainer."""

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Begin the subcommands."""
        self.commands = super().add_subcommands(*args, **kwargs)
        return self.commands


class ClampCLI(LightningCLI):
    """LightningCLI for any model and data by class path, with the callback attached and two commands of our own.

    Args:
        args: Arguments of the command line.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            trainer_class=CalibratingTrainer,
            save_config_callback=SaveConfig,
            # A number, so that a run and its printed config are the same run.
            seed_everything_default=0,
            parser_class=ClampParser,
            parser_kwargs={
                "prog": _PROGRAM,
                "description": "Train with Lightning and come out calibrated, or calibrate what was trained.",
                "version": __version__,
                # Errors print the usage first, and that of a hundred options would bury them.
                **{name: {"usage": f"{_PROGRAM} {name} [options]"} for name in self.subcommands()},
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands, ``calibrate`` and ``check``, with the arguments that come from elsewhere."""
        ours = {"calibrate": {"model", "datamodule"}, "check": {"model", "datamodule"}}
        return {**LightningCLI.subcommands(), **ours}

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """List ``report`` with the other commands."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        parser = report_parser()
        assert isinstance(self.parser, ClampParser)
        self.parser.commands.add_subcommand("report", parser, help=parser.description)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Attach the callback."""
        parser.add_lightning_class_args(NeuralClamping, "calibration")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and let the model have the hyperparameters of its checkpoint."""
        # A list, or None for sys.argv: see __init__. Lightning's own warns of a list where sys.argv has something too.
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        command = self.config.subcommand
        if command == "report":
            raise MisconfigurationException(f"`report` takes no options before it: {_PROGRAM} report PATH.")
        options = self.config[command]
        path = self.ckpt_path = options.get("ckpt_path")
        # Else it may be a URL, or one of Lightning's words. Only strategies that split a network read folders, and the
        # callback does not work with them.
        folder = path not in (None, *_WORDS) and command != "validate" and os.path.isdir(path)
        if path is not None and (folder or os.path.isfile(path)):
            checkpoint = _checkpoint(path)
            if command == "fit":
                check_resumable(checkpoint, path)
            model = {command: {"model": _as_trained(options.model, checkpoint)}}
            self.config = parser.parse_object(model, self.config)
            # Lightning would do this next, and cannot for what was trained without its command line.
            self.config[command].ckpt_path = None
        elif path is not None and path.endswith(".ckpt") and "://" not in path and not os.path.exists(path):
            raise MisconfigurationException(f"There is no checkpoint {path!r}.")

    def before_instantiate_classes(self) -> None:
        """Refuse what the callback would, in a sentence."""
        options = self.config[self.config.subcommand]
        if "ckpt_path" in options:
            options.ckpt_path = self.ckpt_path
        if any(path.endswith(".NeuralClamping") for path in _class_paths(options.trainer.callbacks)):
            raise MisconfigurationException(
                "NeuralClamping is attached already: give its options under `calibration`, not in `trainer.callbacks`."
            )
        try:
            NeuralClamping(**options.calibration)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"--calibration: {error}") from error

    def before_fit(self) -> None:
        """Refuse what the callback would, before other processes are started."""
        assert isinstance(self.trainer, CalibratingTrainer)
        check_method(self.trainer, self.trainer.clamping.plan)

    def after_fit(self) -> None:
        """Refuse to end well without what was promised."""
        assert isinstance(self.trainer, CalibratingTrainer)
        if self.trainer.clamping.result is None:
            raise MisconfigurationException(
                "This fit has ended without a calibrated model, and a warning above says why. What was trained is "
                f"there: mend that, and run {_PROGRAM} calibrate --ckpt_path=..."
            )


def _as_trained(model: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The config of a model with the hyperparameters of a checkpoint, as far as its class takes them.

    The class is the user's: no file decides what is imported.
    """
    hyperparameters = checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    taken = model.get("init_args", {})
    return {"class_path": model.class_path, "init_args": {n: v for n, v in hyperparameters.items() if n in taken}}


def _class_paths(callbacks: Any) -> list[str]:
    """Class paths in a config of one callback, several, or none."""
    several = callbacks if isinstance(callbacks, list) else [callbacks]
    return [callback.class_path for callback in several if callback is not None]


def report_parser() -> LightningArgumentParser:
    """Parser of ``report``."""
    parser = LightningArgumentParser(
        prog=f"{_PROGRAM} report",
        description="Print the metrics before and after of a calibrated checkpoint, and draw its pictures.",
    )
    parser.add_argument("path", type=str, help="A calibrated checkpoint.")
    parser.add_argument("--out", type=str | None, help="Folder for the pictures; by default that of the checkpoint.")
    return parser


def report(args: list[str]) -> None:
    """Print the metrics before and after of a calibrated checkpoint, and draw its pictures.

    Args:
        args: Arguments of the command: the path, and where to draw.

    Raises:
        MisconfigurationException: If the file cannot be read, or holds no clamp.
    """
    options = report_parser().parse_args(args)
    with _refusals(options.path):
        result = read_result(options.path)
    sys.stdout.write(f"{result}\n")
    path = Path(options.path)
    folder = Path(options.out or path.parent)
    if folder.exists() and not folder.is_dir():
        raise MisconfigurationException(f"--out must be a folder, and {str(folder)!r} is a file.")
    for picture in _draw(result, folder, path.stem):
        sys.stdout.write(f"drawn: {picture}\n")


def _draw(result: CalibrationResult, folder: Path, stem: str) -> list[Path]:
    """Write the pictures, and return their paths."""
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError:
        raise MisconfigurationException("The pictures need matplotlib: pip install matplotlib.") from None
    drawn = figures(result)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}-{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return paths
