"""What is run: LightningCLI with the callback attached, and commands of our own."""

import os
import signal
import sys
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.imports import RequirementCache

from lightning_clamp import __version__
from lightning_clamp._trainer.devices import check_method
from lightning_clamp.callback import NeuralClamping
from lightning_clamp.checkpoint import check_resumable
from lightning_clamp.cli.config import SaveConfig
from lightning_clamp.cli.files import checkpoint_in
from lightning_clamp.cli.report import PROGRAM, report, report_parser
from lightning_clamp.cli.trainer import CalibratingTrainer

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
        sys.stderr.write(f"{PROGRAM}: error: {error}\n")
        raise SystemExit(2) from None
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None


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
                "prog": PROGRAM,
                "description": "Train with Lightning and come out calibrated, or calibrate what was trained.",
                "version": __version__,
                # Errors print the usage first, and that of a hundred options would bury them.
                **{name: {"usage": f"{PROGRAM} {name} [options]"} for name in self.subcommands()},
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
            raise MisconfigurationException(f"`report` takes no options before it: {PROGRAM} report PATH.")
        options = self.config[command]
        path = self.ckpt_path = options.get("ckpt_path")
        # Else it may be a URL, or one of Lightning's words. Only strategies that split a network read folders, and the
        # callback does not work with them.
        folder = path not in (None, *_WORDS) and command != "validate" and os.path.isdir(path)
        if path is not None and (folder or os.path.isfile(path)):
            checkpoint = checkpoint_in(path)
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
                f"there: mend that, and run {PROGRAM} calibrate --ckpt_path=..."
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
