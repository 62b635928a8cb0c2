"""Files in a known state before a measurement: out of memory, or in it."""

import os
import pathlib

READ_BYTES = 8 << 20
PROBES = 256  # pages looked at to see how much of a folder is in memory


def _files(path) -> list[pathlib.Path]:
    """Every file below a folder, in order."""
    return sorted(p for p in pathlib.Path(path).rglob("*") if p.is_file())


def forget(path):
    """Writes everything to disk and asks the kernel to drop a folder's pages from memory.

    Needs no privilege, unlike dropping all caches. Where the system has no posix_fadvise (macOS)
    the pages stay.
    """
    os.sync()
    if not hasattr(os, "posix_fadvise"):
        return
    for file in _files(path):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(path):
    """Reads every file below a folder, so that its pages are in memory if they fit."""
    buffer = bytearray(READ_BYTES)
    for file in _files(path):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def resident_share(path) -> float | None:
    """Share of a folder's bytes that are in memory, from a few hundred pages; None if unknown."""
    sizes = {file: file.stat().st_size for file in _files(path)}
    if not hasattr(os, "RWF_NOWAIT") or not any(sizes.values()):
        return None
    there = probes = 0
    for file, size in sizes.items():
        with open(file, "rb") as opened:
            for offset in range(0, size, max(1, sum(sizes.values()) // PROBES)):
                probes += 1
                try:
                    there += os.preadv(opened.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
                except OSError:  # not there (EAGAIN), or a file system that cannot say
                    pass
    return there / probes
