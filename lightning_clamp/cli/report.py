"""The command ``report``: what was calibrated, from the checkpoint alone."""

import sys
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from lightning_clamp.checkpoint import read_result
from lightning_clamp.clamping.result import CalibrationResult
from lightning_clamp.cli.files import refusals
from lightning_clamp.report import figures

PROGRAM = "lightning-clamp"


def report_parser() -> LightningArgumentParser:
    """Parser of ``report``."""
    parser = LightningArgumentParser(
        prog=f"{PROGRAM} report",
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
    with refusals(options.path):
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
