"""What worker processes learn, for the process that started them: Lightning's spawned workers end with their memory."""

import multiprocessing
import os
import tempfile
import weakref
from contextlib import suppress
from typing import Any
from uuid import uuid4

from lightning_clamp._files import read_safely, write_atomically
from lightning_clamp.checkpoint import result_from_state, state_of_result
from lightning_clamp.clamping.result import CalibrationResult


class Mailbox:
    """A file in the temporary folder that is named in one process and written in its children, if it has any.

    Copies know the name, whether they were forked or pickled. What nobody has read goes with the mailbox, at the latest
    when its process ends.
    """

    def __init__(self) -> None:
        self._home = os.getpid()
        self._path = os.path.join(tempfile.gettempdir(), f"lightning_clamp-{uuid4().hex}.pt")
        weakref.finalize(self, _discard, self._home, self._path)

    def send(self, result: CalibrationResult, path: str | None) -> None:
        """Leave it for the parent, in a child process; elsewhere there is nobody to leave it for."""
        if os.getpid() != self._home and multiprocessing.parent_process() is not None:
            write_atomically({"result": state_of_result(result), "path": path}, self._path)

    def receive(self) -> tuple[CalibrationResult, str | None] | None:
        """The result that was left, and where it was saved; None for nothing.

        At home it is taken out; children only look.
        """
        if not os.path.exists(self._path):
            return None
        content: dict[str, Any] = read_safely(self._path)
        if os.getpid() == self._home:
            os.remove(self._path)
        return result_from_state(content["result"]), content["path"]


def _discard(home: int, path: str) -> None:
    """Remove what was left; a forked copy of the mailbox goes before anybody has read it."""
    if os.getpid() == home:
        with suppress(FileNotFoundError):
            os.remove(path)
