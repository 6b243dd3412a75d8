"""Files that are written whole or not at all, and read without running anything in them; also behind a URL."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TypeAlias
from uuid import uuid4

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

Path: TypeAlias = str | os.PathLike[str]
# What a killed process left is removed after this many seconds: no write takes a day.
_STALE = 86_400


def is_url(path: Path) -> bool:
    """Whether a path is one of another file system, such as ``s3://…``."""
    return "://" in os.fspath(path)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, or what a URL names, for reading; who replaces it meanwhile does not change what is read.

    Raises:
        OSError: If there is none, or it may not be read.
        ValueError: If it is a folder.
    """
    if is_url(path):
        with get_filesystem(os.fspath(path)).open(os.fspath(path), "rb") as file:
            yield file
        return
    if os.path.isdir(path):
        raise ValueError(f"{os.fspath(path)!r} is a folder: pass the file whose name ends in .ckpt.")
    with open(path, "rb") as file:
        yield file


def read_safely(path: Path) -> Any:
    """Read a file to the CPU, of tensors and plain values only; errors as in :func:`opened` and :func:`load_safely`."""
    with opened(path) as file:
        return load_safely(file, path)


def load_safely(file: IO[bytes], path: Path) -> Any:
    """``torch.load`` to the CPU, of tensors and plain values only; ``path`` is for the error.

    Raises:
        ValueError: If the content is damaged, is nothing of torch's, or holds objects that a safe load refuses.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # in damaged bytes a reader can meet anything; it is raised again
        # Torch seeks to before the start of a truncated file. What else the system objects to, it says itself.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{os.fspath(path)!r} is damaged, or no checkpoint that can be loaded safely: {cause}"
        ) from error


def write_atomically(content: Any, path: Path) -> None:
    """``torch.save`` under a temporary name in the same folder, then rename: the file is old, or new, and never half.

    The name is one that nobody else has, so that several may write at once, and the last one wins. A link stays one,
    and what it leads to is written.

    Lightning's own way writes to the system's temporary folder first, and moves from there: a copy, where that is
    another disk.

    Raises:
        OSError: If the system refuses, for a full disk for one.
    """
    path = os.path.realpath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    _remove_leftovers(path)
    temporary = f"{path}.{uuid4().hex[:12]}.tmp"
    # "x": a file that is there, or a link, is not opened.
    file = open(temporary, "xb")  # noqa: SIM115 - what goes wrong from here on removes it
    try:
        with file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        if (cause := _of_the_system(error)) is not None:
            said = f"{cause.strerror}, so it was not saved, and what was there before is untouched"
            raise OSError(cause.errno, said, path) from error
        raise


def _remove_leftovers(path: str) -> None:
    """Remove what processes left that were killed while they wrote this file."""
    folder, name = os.path.split(path)
    for entry in os.scandir(folder):
        if entry.name.startswith(f"{name}.") and entry.name.endswith(".tmp"):
            # Somebody else may have removed it meanwhile, or own it.
            with suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE:
                    os.remove(entry.path)


def _of_the_system(error: BaseException | None) -> OSError | None:
    """What the system objected to, such as a full disk: torch raises an error of its own on top of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
