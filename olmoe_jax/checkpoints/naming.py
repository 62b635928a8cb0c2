"""Names of checkpoints, where they lie in a run's workdir, and which of them are complete.

    WORKDIR/checkpoints/step5000-tokens20B   parameters, kept for ever
    WORKDIR/resume/step5000-tokens20B        whole train states

A save is written beside its place under a name with Orbax's temporary suffix and renamed when it is
complete (on object stores: marked by a file), so a name that `parse_name` knows is a finished save.
"""

import re
import time

from etils import epath

CHECKPOINTS = "checkpoints"
RESUME = "resume"
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's suffix of a save under way
DELETED = ".deleted"  # ours, of a directory being removed
COMMIT_FILE = "commit_success.txt"

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
    """Whether `path` is a finished save: under a final name, and on an object store marked so."""
    path = epath.Path(path)
    if parse_name(path.name) is None or not path.is_dir():
        return False
    return "://" not in str(path) or (path / COMMIT_FILE).exists()


def list_complete(folder) -> list[tuple[int, epath.Path]]:
    """(step, path) of every finished save directly in `folder`, by rising step."""
    folder = epath.Path(folder)
    if not folder.is_dir():
        return []
    return sorted((parse_name(p.name), p) for p in folder.iterdir() if is_complete(p))


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
        if name != path.name or not is_complete(path):
            if parse_name(name) is not None and path.is_dir():
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
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such directory; expected a run's workdir or one of its checkpoints"
        )
    if is_complete(path):
        return path
    if path.name.split(TEMPORARY)[0] != path.name:
        raise FileNotFoundError(f"{path}: a save that was not finished; take another checkpoint")
    if found := list_checkpoints(path):
        return found[-1][1]
    raise FileNotFoundError(
        f"{path}: neither a checkpoint (a directory such as step5000-tokens20B) nor a workdir with "
        f"finished ones in {path / CHECKPOINTS}"
    )
