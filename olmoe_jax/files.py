"""Files that several processes may be at: replaced as a whole, locked by one at a time."""

import contextlib
import fcntl
import json
import os
import pathlib


@contextlib.contextmanager
def whole(path, mode="wb", **options):
    """A file to write to that comes to lie at `path`, whole, unless the block fails.

    Args:
      path: its folder is made if need be.
      mode, options: of `open`.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **options) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a text file, whole or not at all; its folder is made if need be."""
    with whole(path, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path, content, default=None):
    """Writes a JSON file as `write_text` does; `default` as of `json.dumps`.

    Raises:
      ValueError: the content holds NaN or an infinity, which JSON does not have.
    """
    write_text(path, json.dumps(content, indent=2, default=default, allow_nan=False) + "\n")


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
