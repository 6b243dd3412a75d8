"""What worker processes learn, for the process that started them: Lightning's spawned workers end with their memory."""

import multiprocessing
import os
import tempfile
from typing import Any, NamedTuple
from uuid import uuid4

import torch

from lightning_clamp.checkpoint import Calibrated, from_state, to_state, write_atomically
from lightning_clamp.clamping import CalibrationResult, Candidate, Clamp
from lightning_clamp.metrics import ReliabilityCurve
from lightning_clamp.metrics.bootstrap import Interval


class Outcome(NamedTuple):
    """What a calibration leaves in the process that ran it.

    Attributes:
        result: What was done.
        calibrated: What is kept of it.
        path: The saved checkpoint, None for none.
    """

    result: CalibrationResult
    calibrated: Calibrated
    path: str | None


class Mailbox:
    """A file in the temporary folder that is named in one process and written in its children, if it has any.

    Copies know the name, whether they were forked or pickled.
    """

    def __init__(self) -> None:
        self._home = os.getpid()
        self._path = os.path.join(tempfile.gettempdir(), f"lightning_clamp-{uuid4().hex}.pt")

    def send(self, outcome: Outcome) -> None:
        """Leave it for the parent, in a child process; elsewhere there is nobody to leave it for."""
        if os.getpid() != self._home and multiprocessing.parent_process() is not None:
            write_atomically({**outcome._asdict(), "calibrated": to_state(outcome.calibrated)}, self._path)

    def receive(self) -> Outcome | None:
        """What was left, None for nothing. At home it is taken out; children only look."""
        if not os.path.exists(self._path):
            return None
        # Still nothing is executed: these are the classes that a result consists of.
        with torch.serialization.safe_globals([CalibrationResult, Candidate, Clamp, Interval, ReliabilityCurve]):
            content: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
        if os.getpid() == self._home:
            os.remove(self._path)
        return Outcome(content["result"], from_state(content["calibrated"]), content["path"])
