"""One training at a time in a run folder."""

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".fastvae-lock"
_HELD: set[str] = set()  # locks of this process, which the system does not keep from itself


class RunLockedError(FileExistsError):
    """Another training writes to the run folder."""


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Keep all other trainings out of a run folder inside the block; folders that are missing are made.

    The operating system holds the lock and releases it with the process, however that ends. Processes that this one
    forks, such as those that load images, do not keep it. A folder that was made here and is still empty at the end of
    the block is removed.

    Raises:
        RunLockedError: another training has the lock.
        OSError: the folder cannot be written.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    path = os.path.join(os.path.realpath(run), LOCK_FILE)  # noqa: PTH118 - and no link to another file
    handle = None
    try:
        handle = _acquire(path, run)
        _HELD.add(path)
        yield
    finally:
        if handle is not None:
            _HELD.discard(path)
            with suppress(OSError):  # the folder has gone
                os.unlink(path)  # noqa: PTH108 - before the lock is released, or it could be that of another training
            os.close(handle)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # not empty
                break


def _acquire(path: str, run: Path) -> int:
    while True:
        if path in _HELD:  # closing a second handle of the file would release the lock
            raise _locked(run, f"process {os.getpid()}")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is not None:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 200).decode(errors="replace").strip()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(handle)
                raise _locked(run, owner or "another process") from None
            warnings.warn(f"the file system of {run} has no locks: start no second training in it", stacklevel=2)
        # a training that has just ended may have removed the file that was opened
        if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):  # noqa: PTH110, PTH116
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return handle
        os.close(handle)


def _locked(run: Path, owner: str) -> RunLockedError:
    return RunLockedError(
        f"another training ({owner}) writes to the run folder {run}. Wait until it ends, or choose another --out."
    )
