"""Processes that want the same file in a cache folder wait for the first of them to make it."""

from __future__ import annotations

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it when its holder dies.

    On a file system without locks nothing is held: it saves work, and what it guards must appear by one rename anyway.
    """
    with lock_file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.info("%s cannot be locked (%s); other processes may do the same work", lock_file, error.strerror)
        yield
