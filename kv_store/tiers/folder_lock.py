"""One folder, one process: each store claims a sub-folder of its own under a shared root."""

from __future__ import annotations

import fcntl
import os
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class ClaimedFolder(NamedTuple):
    """A folder nobody else writes to while ``lock_fd`` is open; the kernel frees it at a crash."""

    path: Path
    lock_fd: int

    def release(self) -> None:
        """Let another process have it."""
        os.close(self.lock_fd)


def claim_folder(root: Path) -> ClaimedFolder:
    """The first sub-folder of ``root`` that is free, or a new one.

    So a process that starts after another has ended finds that one's pages.

    Raises:
        OSError: the file system refuses.
    """
    for number in count():
        path = root / f"replica-{number}"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
        except OSError:
            os.close(lock_fd)
            raise
        else:
            return ClaimedFolder(path, lock_fd)
    raise AssertionError("count() never ends")
