"""What this process runs on: free memory and disk, cores, versions, the commit. Imports no JAX."""

import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import subprocess

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes", "orbax-checkpoint", "tensorstore",
    "tensorflow-datasets", "grain", "array_record", "ml_collections", "tokenizers", "libtpu",
)  # fmt: skip
VARIABLES = (  # that change results or speed
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "OMP_NUM_THREADS",
)
# With which glibc keeps large freed blocks: tunable → (number in malloc.h, value; -1: no limit).
MALLOC = {"mmap_threshold": (-3, -1), "trim_threshold": (-1, -1), "arena_max": (-8, 1)}


def environment() -> dict:
    """All of the below that does not change while a process runs; plain values, for JSON."""
    return {
        "python": platform.python_version(),
        "packages": versions(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "cores_of_machine": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git_commit": commit(),
    }


def versions() -> dict[str, str]:
    """Package → version, of those of PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor(root="/") -> str:
    """The processor's name; where the system does not tell, its architecture."""
    for line in _lines(pathlib.Path(root) / "proc/cpuinfo"):
        if match := re.match(r"model name\s*:\s*(.+)", line):
            return match[1]
    return platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def free_memory(root="/") -> int | None:
    """Bytes of main memory that this process may still take; None if unknown.

    The least of what the machine has available and what a container's limit (cgroup v2) leaves.
    """
    root, limits = pathlib.Path(root), []
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    cgroup = root / "sys/fs/cgroup"
    limit, used = (next(iter(_lines(cgroup / f"memory.{name}")), "") for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        cache = [
            line.split()[1]
            for line in _lines(cgroup / "memory.stat")
            if line.startswith("inactive_file ")
        ]
        limits.append(int(limit) - int(used) + int(cache[0] if cache else 0))
    return min(limits, default=None)


def free_disk(path) -> int | None:
    """Bytes free where `path` is or will be; None on an object store."""
    if "://" in str(path):
        return None
    path = pathlib.Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk(path, needed, what, remedy):
    """Refuses to begin where there is no room for `needed` bytes.

    Args:
      path: where they will be written.
      what: takes them, as in "activations".
      remedy: what a person can do about it, as in "name another --output".

    Raises:
      OSError: there is none.
    """
    free = free_disk(path)
    if free is not None and needed > free:
        raise OSError(
            f"{path}: {needed / 1e9:.1f} GB are needed for {what} but {free / 1e9:.1f} GB are "
            f"free; {remedy}"
        )


def commit() -> str | None:
    """Commit of the checkout that this file lies in ("…+changes" if it was edited), or None."""
    root = pathlib.Path(__file__).resolve().parents[1]
    # Installed, the file may lie in somebody else's repository, which says nothing about this code.
    if not (root / ".git").exists():
        return None
    try:
        edited = _git(root, "status", "--porcelain", "-uno")
        return _git(root, "rev-parse", "HEAD") + ("+changes" if edited else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root, *args):
    command = ["git", "-C", str(root), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _lines(path):
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
