"""Where the weights of a port come from: a foreign folder, or a checkpoint of ours.

Both answer in our terms: stored arrays (`layers/00/moe/w_gate`, see `checkpoints.layout`), read one
window at a time.
"""

import copy
import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
from etils import epath

from olmoe_jax import checkpoints, generation
from olmoe_jax import config as config_lib
from olmoe_jax.checkpoints import layout, manifest, naming, reading, streamed
from olmoe_jax.porting import configs, families, folders, tokenizer_files, transposing

WORKDIR = "workdir"
CHECKPOINT = "checkpoint"
ORBAX = "orbax"
FOREIGN = (folders.HUGGING_FACE, folders.OLMO)

DTYPES = ("float32", "bfloat16", "float16")
SOURCE = "source"  # the folder of a ported checkpoint with the files of the original
PLAN = "plan.json"  # in it: how the original's tensors were spread over files


def kind_of(directory) -> str:
    """Which kind of model directory: "workdir", "checkpoint", "orbax", "huggingface" or "olmo".

    Raises:
      FileNotFoundError: it does not exist, or is none; the message lists what was looked for.
    """
    path = naming.absolute(directory)
    if path.exists() and not path.is_dir():
        raise FileNotFoundError(f"{path}: a file; expected {_EXPECTED}")
    if not naming.unfinished(path) and (kind := folders.is_folder(path)):
        return kind  # first: a revision of a foreign model may have the name of a checkpoint
    try:
        found = naming.find(path)
    except FileNotFoundError:
        if not path.exists() or naming.unfinished(path) or (path / naming.CHECKPOINTS).is_dir():
            raise
        raise FileNotFoundError(_no_model(path)) from None
    if found != path:
        return WORKDIR
    return ORBAX if naming.parse_name(path.name) is None else CHECKPOINT


_EXPECTED = (
    "a run's workdir, one of its checkpoints (such as step5000-tokens20B), an Orbax directory "
    "written by experiments.port_weights, a Hugging Face folder (config.json and *.safetensors), "
    "or a checkpoint of the original training code (config.yaml and model.safetensors)"
)


def _no_model(path) -> str:
    """What a directory holds that is none of the kinds, and what each of them would have."""
    names = sorted(p.name for p in path.iterdir())
    there = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    parts = [part for part in naming.PARTS if not (path / part).exists()]
    lacking = ["checkpoints/ (a workdir)", f"{' and '.join(parts)} (a checkpoint)"]
    if not any(name.endswith(".safetensors") for name in names):
        lacking.append("*.safetensors (Hugging Face)")
    elif "config.json" not in names:
        lacking.append("config.json (Hugging Face)")
    else:
        lacking.append("a model_type in config.json (Hugging Face)")
    missing = ", ".join(lacking)
    return f"{path}: no model; it holds {there}; missing {missing}; expected {_EXPECTED}"


def open_source(path):
    """The `Foreign` or `Checkpoint` at `path`.

    Raises:
      FileNotFoundError, ValueError: there is no model, or it is damaged.
    """
    path = os.path.expanduser(path)
    return (Foreign if kind_of(path) in FOREIGN else Checkpoint)(path)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the tensors of a foreign folder lie in its files, such that it can be made again.

    Attributes:
      format: "huggingface" or "olmo".
      headers: {file: header of its safetensors, verbatim}.
      index: text of model.safetensors.index.json, or None.
    """

    format: str
    headers: dict[str, str]
    index: str | None

    def __post_init__(self):
        names = [n for n in self.headers if n != os.path.basename(n) or n in ("", ".", "..")]
        if names or self.format not in FOREIGN:
            raise ValueError(f"{PLAN}: names {(names or [self.format])[0]!r}, which no port writes")

    def to_json(self) -> bytes:
        """For `plan.json`."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()


class Foreign:
    """A Hugging Face folder or a checkpoint of the original training code.

    Attributes:
      format: "huggingface" or "olmo".
      config: a Config whose model section is the folder's; the rest are defaults.
      leaves: {stored name: (shape, dtype name)}.
      files: {name: bytes} of the small files that travel along, verbatim.
      plan: the Plan, or None where it cannot be kept (pickled weights).
      cast_to: dtype to which the weights were cast after `files` were written, or None.

    Raises:
      FileNotFoundError, ValueError: the folder, its config or its tensors are not as they must be.
    """

    cast_to = None

    def __init__(self, path):
        self.folder = folders.open_folder(path)
        self.path, self.format = self.folder.path, self.folder.format
        read = configs.read if self.format == folders.HUGGING_FACE else configs.read_training
        self.family, model_config = read(self.folder.config, self.path)
        self.config = config_of(model_config)
        self.parts = families.parts(self.family, model_config)
        tensors = {name: located.shape for name, located in self.folder.tensors.items()}
        files = {name: located.file for name, located in self.folder.tensors.items()}
        families.match(
            self.parts, tensors, self.family.ignored, self.path, read=self.folder.read, files=files
        )
        self._parts_of = families.by_array(self.parts)
        self.leaves = self._find_leaves(model_config)
        self.files = {n: (self.folder.path / n).read_bytes() for n in self.folder.carried}
        self.plan = self._make_plan()

    def state(self) -> list:
        """What changes when the files that are read here do."""
        names = (*self.folder.files, *self.folder.carried)
        return [_state(self.folder.path / name) for name in names]

    def read_part(self, part) -> np.ndarray:
        """The rows of a tensor that are `part`, mapped and in their orientation."""
        return self.folder.read(part.theirs)[part.start : part.start + part.shape[0]]

    def read(self, name, window=()) -> np.ndarray:
        """One window (a tuple of slices, missing ones are whole) of a stored array, as stored."""
        shape, dtype = self.leaves[name]
        window = _bounds(window, shape)
        out = np.empty([stop - start for start, stop in window], jnp.dtype(dtype))
        first = window[0][0]
        for part in self._parts_of[name]:
            rows = self.read_part(part)
            if part.index is None:
                inner, target = window, out
            elif first <= part.index < window[0][1]:
                inner, target = window[1:], out[part.index - first]
            else:
                continue
            slices = tuple(slice(*bounds) for bounds in inner)
            source = rows[slices[::-1] if part.transpose else slices]
            transposing.copy(source, target, transpose=part.transpose)
        return out

    def _find_leaves(self, model_config):
        """Shapes by our config, dtypes by the folder: one for all experts of an array."""
        leaves = {}
        for name, leaf in stored_leaves(model_config).items():
            kinds = {self.folder.tensors[p.theirs].dtype: p.theirs for p in self._parts_of[name]}
            if len(kinds) > 1:
                (one, its), (other, another) = list(kinds.items())[:2]
                raise ValueError(
                    f"{self.path}: {its} is {one} but {another} is {other}: they become one array, "
                    "so their dtypes must be the same; pass the weights in one dtype"
                )
            kind, its = next(iter(kinds.items()))
            if kind not in DTYPES:
                file = self.folder.path / self.folder.tensors[its].file
                raise ValueError(f"{file}: {its} is {kind}: expected one of {', '.join(DTYPES)}")
            leaves[name] = leaf.shape, kind
        return leaves

    def _make_plan(self):
        if not self.folder.headers:
            return None
        known = {part.theirs for part in self.parts}
        if known != set(self.folder.tensors):  # buffers that are not kept
            return None
        headers = {name: text.decode() for name, text in self.folder.headers.items()}
        return Plan(self.format, headers, self.folder.index)


class Checkpoint:
    """A checkpoint of ours: of a run, or ported before; attributes as of `Foreign`.

    Attributes:
      format: that of the folder it was ported from; None for a model trained here.
    """

    folder = None

    def __init__(self, path):
        self.path = checkpoints.find(path)
        self.config = checkpoints.read_config(self.path)
        content = json.loads((self.path / "config.json").read_text())
        self._reader = streamed.StreamedReader(self.path)
        self.leaves = {n: (leaf.shape, leaf.dtype) for n, leaf in self._reader.leaves.items()}
        wanted = {n: tuple(x.shape) for n, x in stored_leaves(self.config.model).items()}
        if wanted != {n: tuple(shape) for n, (shape, _) in self.leaves.items()}:
            checkpoints.read_params(self.path)  # says what is missing
        ported = content.get("ported", {})
        self.format, self.cast_to = ported.get("format"), ported.get("dtype")
        if bad := manifest.damaged_files(self.path):
            raise manifest.DamagedError(f"{self.path}: {bad[0]} is not as it was written")
        self.plan = None
        if (folder := self.path / SOURCE).is_dir():
            self.files = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
            if (plan := self.files.pop(PLAN, None)) is not None:
                self.plan = Plan(**json.loads(plan))
        elif (tokenizer := generation.find_tokenizer(self.path)) is not None:
            self.files = tokenizer_files.make(tokenizer, self.config.model.max_length)
        else:
            self.files = {}

    def state(self) -> list:
        """What changes when the files that are read here do."""
        files = sorted((self.path / manifest.FOLDER).glob("process_*.json"))
        return [_state(file) for file in files]

    def read(self, name, window=()) -> np.ndarray:
        """One window (a tuple of slices, missing ones are whole) of a stored array, as stored."""
        window = _bounds(window, self.leaves[name][0])
        rows = self._reader.read(name, *window[0])
        return rows[(slice(None), *(slice(*bounds) for bounds in window[1:]))]


def without_biases(source):
    """A source without router biases, for formats that have none: itself, or a view of it.

    Biases that are all zero change no choice, so the model without them is the same.

    Raises:
      ValueError: there are some that are not zero.
    """
    if not source.config.model.router_bias:
        return source
    biases = [name for name in source.leaves if name.endswith("/router_bias")]
    if moved := [name for name in biases if np.any(source.read(name))]:
        raise ValueError(
            f"{source.path}: {len(moved)} of its {len(biases)} router biases are not zero "
            f"({moved[0]}, …): no class of that format adds a bias to the choice of experts "
            "(config.model.router_bias); it can be ported to orbax alone"
        )
    view = copy.copy(source)
    view.leaves = {name: leaf for name, leaf in source.leaves.items() if name not in biases}
    model = dataclasses.replace(source.config.model, router_bias=False)
    view.config = dataclasses.replace(source.config, model=model)
    return view


def has_hashes(source) -> bool:
    """Whether a `Foreign` or a `Checkpoint` lies with hashes of what was written."""
    return (epath.Path(source.path) / manifest.FOLDER).is_dir()


def check_hashes(source):
    """Compares a `Foreign` that was written here with its manifest, tensor by tensor.

    Raises:
      ValueError: there is no manifest. DamagedError: tensors or files are not as they were.
    """
    path = epath.Path(source.path)
    if not has_hashes(source):
        raise ValueError(
            f"{path}: nothing to verify against: folders written by experiments.port_weights have "
            f"a {manifest.FOLDER}/ with hashes, this one has none; load it without verify"
        )
    bad = manifest.damaged_files(path)
    for name, leaf in manifest.read(path).items():
        located = source.folder.tensors.get(name)
        if located is None or (located.shape, located.dtype) != (leaf.shape, leaf.dtype):
            bad.append(name)
            continue
        tensor = source.folder.read(name)
        for piece in leaf.pieces:
            rows = tensor[piece.start[0] : piece.start[0] + piece.shape[0]]
            if manifest.digest(rows) != piece.sha256:
                bad.append(name)
                break
    if bad:
        names = ", ".join(bad[:3]) + (", …" if len(bad) > 3 else "")
        raise manifest.DamagedError(f"{path}: {len(bad)} tensors or files damaged ({names})")


def verify(source):
    """Recomputes the hashes of a `Foreign` or a `Checkpoint`; one that has none passes.

    Raises:
      DamagedError: tensors or files are not as they were written.
    """
    if not has_hashes(source):
        return
    if source.folder is not None:
        check_hashes(source)
    else:
        path = epath.Path(source.path)
        reading.check_hashes(path, reading.PARAMS, manifest.read(path))


def stored_leaves(model_config) -> dict:
    """{stored name: jax.ShapeDtypeStruct} of a ModelConfig's parameters."""
    abstract = checkpoints.abstract_params(model_config)
    return layout.flatten(layout.to_stored(abstract, model_config))


def config_of(model_config) -> config_lib.Config:
    """A whole Config around an architecture that was not trained here."""
    data = config_lib.DataConfig(sequence_length=model_config.max_length)
    return config_lib.Config(model=model_config, data=data)


def _state(path):
    status = os.stat(path)
    return str(path), status.st_size, status.st_mtime_ns


def _bounds(window, shape):
    """((start, stop), …) of every dimension."""
    window = (*window, *(slice(None) for _ in shape[len(window) :]))
    return tuple(s.indices(size)[:2] for s, size in zip(window, shape, strict=True))
