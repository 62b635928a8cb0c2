"""Names of checkpoints, where they lie in a run's workdir, and which of them are complete.

    WORKDIR/checkpoints/step5000-tokens20B   parameters, kept for ever
    WORKDIR/resume/step5000-tokens20B        whole train states
    ANYWHERE                                 parameters that `streamed` wrote, or a copy

A save is written beside its place under a name with Orbax's temporary suffix and renamed when it is
complete (on object stores: marked by a file), so a name that `parse_name` knows is a finished save.
Under any other name, a directory is one if it has a manifest, parameters and a config.json, since
`streamed` too renames what is complete.
"""

import re
import time

from etils import epath

CHECKPOINTS = "checkpoints"
RESUME = "resume"
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's suffix of a save under way
DELETED = ".deleted"  # ours, of a directory being removed
PARTIAL = ".partial"  # ours, of a directory that `partial` writes
COMMIT_FILE = "commit_success.txt"
PARTS = ("params", "manifest/process_0.json", "config.json")  # of kept parameters

_NAME = re.compile(r"step(\d+)-tokens\d+[KMB]")


def checkpoint_name(step: int, tokens: int) -> str:
    """Directory name of the checkpoint after `step` steps and `tokens` tokens, rounded down.

    >>> checkpoint_name(5000, 20_971_520_000), checkpoint_name(10, 20_480), checkpoint_name(0, 0)
    ('step5000-tokens20B', 'step10-tokens20K', 'step0-tokens0K')
    """
    size, unit = next((s, u) for s, u in ((10**9, "B"), (10**6, "M"), (0, "K")) if tokens >= s)
    return f"step{step}-tokens{tokens // (size or 1000)}{unit}"


def parse_name(name: str) -> int | None:
    """The step in a checkpoint's directory name; None if it is not one.

    >>> parse_name("step5000-tokens20B"), parse_name("step5000-tokens20B.orbax-checkpoint-tmp")
    (5000, None)
    """
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_complete(path) -> bool:
    """Whether `path` is a finished save of a run or a whole checkpoint under another name."""
    path = epath.Path(path)
    if not path.is_dir():
        return False
    if parse_name(path.name) is None:
        return unfinished(path) is None and all((path / part).exists() for part in PARTS)
    return "://" not in str(path) or (path / COMMIT_FILE).exists()


def unfinished(path) -> str | None:
    """What a directory whose name marks it as unfinished is, and what to do; None: no such name."""
    name = epath.Path(path).name
    if TEMPORARY in name or name.endswith(DELETED):
        return "a save that did not finish; take another checkpoint"
    if name.endswith(PARTIAL):
        return "a port or upcycling that did not finish: run the same command again"
    return None


def list_complete(folder) -> list[tuple[int, epath.Path]]:
    """(step, path) of every finished save directly in `folder`, by rising step."""
    folder = epath.Path(folder)
    if not folder.is_dir():
        return []
    named = [(parse_name(p.name), p) for p in folder.iterdir()]
    return sorted((step, p) for step, p in named if step is not None and is_complete(p))


def list_checkpoints(workdir) -> list[tuple[int, epath.Path]]:
    """(step, path) of a run's kept parameters, by rising step; unfinished saves do not show."""
    return list_complete(epath.Path(workdir) / CHECKPOINTS)


def leftovers(folder) -> list[epath.Path]:
    """Directories in `folder` that a killed save or removal left behind."""
    folder = epath.Path(folder)
    if not folder.is_dir():
        return []
    out = []
    for path in sorted(folder.iterdir()):
        name = path.name.split(TEMPORARY)[0].removesuffix(DELETED)
        if parse_name(name) is not None and path.is_dir():
            if name != path.name or not is_complete(path):
                out.append(path)
    return out


def remove_leftover(path):
    """Removes a directory, with patience: what failed a save may still be adding files."""
    for attempt in range(5):
        try:
            return path.rmtree()
        except OSError:
            if attempt == 4:
                raise
            time.sleep(0.2)


def remove(path):
    """Removes a finished save such that a kill in between leaves nothing that looks finished."""
    path = epath.Path(path)
    if "://" in str(path):
        (path / COMMIT_FILE).unlink(missing_ok=True)
    else:
        path = path.rename(path.with_name(path.name + DELETED))
    path.rmtree()


def absolute(path) -> epath.Path:
    """`path` as Orbax demands it; an object store's URL stays as it is."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.expanduser().absolute()


def find(path) -> epath.Path:
    """One checkpoint: `path` itself, or the newest of the run whose workdir it is.

    Raises:
      FileNotFoundError: nothing is there, or it is neither.
    """
    path = absolute(path)
    if is_complete(path):
        return path
    if reason := unfinished(path):
        raise FileNotFoundError(f"{path}: {reason}")
    if found := list_checkpoints(path):
        return found[-1][1]
    if (path / CHECKPOINTS).is_dir():
        raise FileNotFoundError(
            f"{path}: a workdir without a finished checkpoint in {path / CHECKPOINTS}; train until "
            "the first is saved"
        )
    if path.exists():
        raise FileNotFoundError(
            f"{path}: neither a checkpoint (a directory such as step5000-tokens20B, or one with "
            f"{', '.join(PARTS)}) nor a workdir (one with {CHECKPOINTS})"
        )
    started = path.with_name(path.name + PARTIAL)
    expected = "expected a run's workdir or a checkpoint"
    raise FileNotFoundError(
        f"{path}: no such directory; "
        + (f"{started.name} is {unfinished(started)}" if started.exists() else expected)
    )
