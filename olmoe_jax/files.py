"""Files that several processes may be at: locked by one of them at a time. Imports no JAX."""

import contextlib
import fcntl


def try_lock(file) -> bool:
    """Whether an open file is locked now, for this process and until it is closed; False: another
    process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path, *, waiting=lambda: None):
    """Lets one process at a time into the block; the others wait.

    The lock goes with the process, however it ends.

    Args:
      path: of the file that is locked; made if need be.
      waiting: called when another process has the lock.
    """
    with open(path, "w") as file:
        if not try_lock(file):
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
