"""What worker processes learn, for the process that started them: Lightning's spawned workers end with their memory."""

import multiprocessing
import os
import tempfile
from typing import Any, NamedTuple
from uuid import uuid4

from lightning_clamp.checkpoint import Calibrated, from_state, read_safely, to_state, write_atomically


class Outcome(NamedTuple):
    """What a calibration leaves in the process that ran it.

    Attributes:
        calibrated: What was done, and what it belongs to.
        path: The saved checkpoint, None for none.
    """

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
            write_atomically({"calibrated": to_state(outcome.calibrated), "path": outcome.path}, self._path)

    def receive(self) -> Outcome | None:
        """What was left, None for nothing. At home it is taken out; children only look."""
        if not os.path.exists(self._path):
            return None
        content: dict[str, Any] = read_safely(self._path)
        if os.getpid() == self._home:
            os.remove(self._path)
        return Outcome(from_state(content["calibrated"]), content["path"])
