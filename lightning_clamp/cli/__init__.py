"""The command line: Lightning's commands with the clamp; ``calibrate``, ``check`` and ``report`` for checkpoints."""

from lightning_clamp.cli.command import main

__all__ = ["main"]
