"""A directory that takes long to write: complete under its name or absent, and resumable.

    OUTPUT.partial/journal.jsonl   the job, then a line for every piece that was written

It becomes OUTPUT by one rename, so nothing interrupted looks complete; running the same job again
finds the pieces in the journal. The journal says what was handed to the system, not what is on the
disk: hash a piece again before you believe in it.
"""

import concurrent.futures
import json
import os
import pathlib
import threading

from olmoe_jax import files
from olmoe_jax.checkpoints import manifest, naming

JOURNAL = "journal.jsonl"
SYNCED_AT_ONCE = 8  # files
HASHED_AT_ONCE = 2  # pieces, when an interrupted run goes on


class Partial:
    """The directory `{path}.partial` on its way to becoming `path`. A context manager.

    Leaving it without `commit` keeps it for the next run of the same job.

    Args:
      path: of the complete directory, on a local disk; its parents are made.
      job: what is written, JSON values; another job may not go on with this one's pieces.

    Attributes:
      path: pathlib.Path of the complete directory.
      folder: pathlib.Path of the directory to write to.
      done: {(name, start): manifest.Piece} that the journal lists; `sound` hashes them again.

    Raises:
      FileExistsError: `path` exists.
      ValueError: `{path}.partial` is of another job, not ours, or another process writes it; or
        `path` has a name of something unfinished.
    """

    def __init__(self, path, job: dict):
        self.path = pathlib.Path(os.fspath(path)).expanduser().absolute()
        self.folder = self.path.with_name(self.path.name + naming.PARTIAL)
        if naming.unfinished(self.path):
            raise ValueError(f"{self.path}: such names mark what is unfinished; take another name")
        if self.path.exists():
            raise FileExistsError(f"{self.path}: exists; take another output or delete it")
        self._lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in self.folder.iterdir() if p.name != JOURNAL]
        self._journal = (self.folder / JOURNAL).open("a+b")
        try:
            self.done = self._read(job, others)
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        self.close()

    def close(self):
        """Leaves the directory as it is; another process may go on with it."""
        self._journal.close()

    def record(self, name: str, start: tuple, shape: tuple, sha256: str):
        """Notes that a piece was written. May be called from several threads."""
        piece = {"name": name, "start": list(start), "shape": list(shape), "sha256": sha256}
        with self._lock:
            self._append(piece)
            self.done[name, tuple(start)] = manifest.Piece(tuple(start), tuple(shape), sha256)

    def sound(self, read) -> dict:
        """Those of `done` whose bytes on the disk have their hash.

        Args:
          read: function of (name, manifest.Piece) that returns the piece's array as it is now, or
            None where it cannot be read; called from several threads.
        """

        def is_sound(item):
            (name, _), piece = item
            data = read(name, piece)
            return data is not None and manifest.digest(data) == piece.sha256

        with concurrent.futures.ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            sound = list(pool.map(is_sound, self.done.items()))
        pairs = zip(self.done.items(), sound, strict=True)
        return {key: piece for (key, piece), good in pairs if good}

    def commit(self):
        """Brings every file to the disk and renames the directory to `path`.

        Raises:
          FileExistsError: `path` was made meanwhile.
          OSError: the disk is full or broken; the directory stays as it is.
        """
        sync(self.folder)
        if self.path.exists():
            raise FileExistsError(f"{self.path}: was made meanwhile; {self.folder} is complete")
        self.folder.rename(self.path)
        # Only now: killed in between, the directory is complete and the journal does no harm.
        (self.path / JOURNAL).unlink()
        _sync_one(self.path)
        _sync_one(self.path.parent)
        self._journal.close()

    def _read(self, job, others):
        """The pieces in the journal, of which a torn last line is cut off."""
        if not files.try_lock(self._journal):
            raise ValueError(f"{self.folder}: another process is writing it")
        self._journal.seek(0)
        whole = self._journal.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        self._journal.truncate(len(whole))
        try:
            first, *rest = [json.loads(line) for line in whole.splitlines()] or [None]
            pieces = [
                (p["name"], manifest.Piece(tuple(p["start"]), tuple(p["shape"]), p["sha256"]))
                for p in rest
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.folder}: {JOURNAL} is damaged ({error!r}); delete that directory"
            ) from error
        if first is None and others:
            raise ValueError(
                f"{self.folder}: was not left by an earlier run ({JOURNAL} is missing or empty); "
                "delete that directory or take another output"
            )
        if first is None:
            self._append(job)
        elif first != (wanted := json.loads(json.dumps(job))):
            names = sorted(n for n in {*first, *wanted} if first.get(n) != wanted.get(n))
            theirs, ours = (", ".join(f"{n}={x.get(n)!r}" for n in names) for x in (first, wanted))
            raise ValueError(
                f"{self.folder}: left by another job: it had {theirs}, this one {ours}; run that "
                "one again or delete that directory"
            )
        return {(name, piece.start): piece for name, piece in pieces}

    def _append(self, value):
        self._journal.write(json.dumps(value).encode() + b"\n")
        self._journal.flush()


def sync(folder):
    """Waits until every file and directory in `folder` is on the disk."""
    paths = [folder, *pathlib.Path(folder).rglob("*")]
    with concurrent.futures.ThreadPoolExecutor(SYNCED_AT_ONCE) as pool:
        for _ in pool.map(_sync_one, paths):
            pass


def _sync_one(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
