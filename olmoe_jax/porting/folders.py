"""Folders of foreign weights: Hugging Face's, and those of the original training code.

`open_folder` checks everything that can be known without reading the weights; `Folder.read` then
maps one tensor into memory. Nothing that such a folder holds can run: safetensors and JSON are
data, YAML goes through `safe_load`, pickled weights through torch's `weights_only` (`pickles`).
"""

import dataclasses
import fnmatch
import functools
import pathlib
import re

import numpy as np
import yaml

from olmoe_jax.porting import olmo_names, pickles, safetensors, tables

HUGGING_FACE = "huggingface"
OLMO = "olmo"
INDEX = "model.safetensors.index.json"

_ONE = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_PICKLED_OLMO = "model.pt"
_CARRIED = (
    "config.json",
    "config.yaml",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model*",  # of SentencePiece; Mistral's end in .v3
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "*.jinja",
)


@dataclasses.dataclass(frozen=True)
class Located:
    """A tensor: its file's name, its dtype as NumPy and ml_dtypes call it, its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that was found sound.

    Attributes:
      format: "huggingface" or "olmo" (the original training code's).
      config: config.json or config.yaml, parsed.
      tensors: {name: Located} in the order of the files and of their data; the training code's
        names are decoded, experts that transformers 5 packed are there one by one.
      files: names of the weight files.
      headers: {file: header verbatim} of safetensors; empty for pickled weights and packed experts.
      index: text of model.safetensors.index.json, or None.
      carried: names of the small files that travel with the weights (config, tokenizer, …).
    """

    path: pathlib.Path
    format: str
    config: dict
    tensors: dict[str, Located]
    files: tuple[str, ...]
    headers: dict[str, bytes]
    index: str | None
    carried: tuple[str, ...]
    _readers: dict = dataclasses.field(repr=False, compare=False)

    def read(self, name) -> np.ndarray:
        """The tensor `name`, read-only, as stored; mapped, so only what is used is read."""
        return self._readers[name]()


def is_folder(path) -> str | None:
    """Which kind of foreign weights `path` seems to hold: "huggingface", "olmo" or None.

    A config.json that cannot be read counts, if there are weights: `open_folder` says what is
    wrong with it. Without a model_type it is not Hugging Face's.
    """
    path = pathlib.Path(path)
    names = _names(path) if path.is_dir() else set()
    if "config.json" in names:
        weights = {INDEX, _PICKLED, _PICKLED_INDEX} & names or fnmatch.filter(
            names, "*.safetensors"
        )
        try:
            config = safetensors.parse_json((path / "config.json").read_bytes(), path)
        except (OSError, ValueError):
            return HUGGING_FACE if weights else None
        return HUGGING_FACE if weights and "model_type" in config else None
    return OLMO if "config.yaml" in names and {_ONE, _PICKLED_OLMO} & names else None


def open_folder(path) -> Folder:
    """Opens a folder of foreign weights and checks that it is whole.

    Hugging Face: config.json and model.safetensors, or the parts that model.safetensors.index.json
    names; without those pytorch_model.bin or the parts of its index. The training code: config.yaml
    and model.safetensors or model.pt.

    Raises:
      FileNotFoundError: no such folder, or its config, its weights or a part of them are missing.
      ValueError: something in it is broken, truncated or contradicts something else; the message
        names the file and the tensor.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    names = _names(path)
    if "config.json" in names:
        file = path / "config.json"
        kind, config = HUGGING_FACE, safetensors.parse_json(file.read_bytes(), file)
    elif "config.yaml" in names:
        kind, config = OLMO, _read_yaml(path / "config.yaml")
    else:
        raise FileNotFoundError(f"{path}: no config.json; it holds {_some(names)}")
    chosen = _choose(path, names, kind)
    weight_map = _read_index(path / chosen, names) if chosen in (INDEX, _PICKLED_INDEX) else None
    files = (chosen,) if weight_map is None else tuple(sorted(set(weight_map.values())))
    tensors, readers, headers = {}, {}, {}
    for file in files:
        for name, located, reader in _scan(path / file, headers):
            if kind == OLMO and file == _ONE:
                name = _decoded(name, path / file)
            if name in tensors:
                raise ValueError(
                    f"{path}: {name!r} is there twice, in {tensors[name].file} and in {file}; "
                    "remove one"
                )
            tensors[name], readers[name] = located, reader
    if weight_map is not None:
        _check_index(path / chosen, weight_map, tensors)
    if kind == HUGGING_FACE and isinstance(config.get("model_type"), str):
        family = tables.FAMILIES.get(config["model_type"])
        unpacked, readers = _unpack(tensors, readers, family.packed if family else {}, path)
        headers = headers if unpacked.keys() == tensors.keys() else {}
        tensors = unpacked
    index = (path / INDEX).read_bytes().decode() if chosen == INDEX else None
    carried = tuple(sorted(n for n in names if any(fnmatch.fnmatchcase(n, p) for p in _CARRIED)))
    return Folder(path, kind, config, tensors, files, headers, index, carried, readers)


def _unpack(tensors, readers, packed, path):
    """The same tensors and readers, packed experts one by one: as views of what is there."""
    patterns = {
        re.compile(re.escape(name).replace(r"\{layer\}", r"(\d+)")): rows
        for name, rows in packed.items()
    }
    found, views = {}, {}
    for name, located in tensors.items():
        new = {}
        for pattern, rows in patterns.items():
            if match := pattern.fullmatch(name):
                new = _pieces(
                    located, readers[name], [r.replace("{layer}", match[1]) for r in rows]
                )
        for piece, (its, reader) in (new or {name: (located, readers[name])}).items():
            if piece in found:
                raise ValueError(f"{path}: {piece!r} is there twice, once in {name}; remove one")
            found[piece], views[piece] = its, reader
    return found, views


def _pieces(located, read, rows):
    """{name: (Located, reader)} of one packed tensor; {} if it has not the shape of one."""
    if "{expert}" not in rows[0]:
        return {rows[0]: (located, read)}
    if len(located.shape) != 3 or located.shape[1] % len(rows):
        return {}
    experts, height, width = located.shape
    height //= len(rows)
    piece = Located(located.file, located.dtype, (height, width))
    return {
        row.format(expert=expert): (piece, functools.partial(_view, read, expert, i, height))
        for expert in range(experts)
        for i, row in enumerate(rows)
    }


def _view(read, expert, i, height):
    """The `i`-th block of `height` rows of one expert of a packed tensor."""
    return read()[expert, i * height : (i + 1) * height]


def _choose(path, names, kind):
    """The file to begin with: an index, or the only file of weights."""
    if kind == OLMO:
        order = (_ONE, _PICKLED_OLMO)
    else:
        order = (INDEX, _ONE, _PICKLED_INDEX, _PICKLED)
    for name in order:
        if name in names:
            return name
    raise FileNotFoundError(
        f"{path}: no weights; expected one of {', '.join(order)}; it holds {_some(names)}"
    )


def _scan(path, headers):
    """(name, Located, function that reads) of each tensor of a file; notes its header."""
    if path.suffix != ".safetensors":
        for name, array in pickles.read(path).items():
            yield name, Located(path.name, array.dtype.name, array.shape), lambda array=array: array
        return
    header = safetensors.read_header(path)
    headers[path.name] = header.text
    for name, tensor in header.tensors.items():
        reader = functools.partial(safetensors.memory_map, path, tensor)
        yield name, Located(path.name, tensor.dtype, tensor.shape), reader


def _names(path):
    """Names of the files in a directory, links to files among them."""
    return {p.name for p in path.iterdir() if p.is_file()}


def _some(names):
    """A few names for a message."""
    names = sorted(names)
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "no files"


def _read_yaml(path):
    """The mapping in a YAML file."""
    try:
        config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a {type(config).__name__}, expected a mapping")
    return config


def _read_index(path, names):
    """{tensor: file} of an index whose parts are all there."""
    index = safetensors.parse_json(path.read_bytes(), path)
    for key in ("metadata", "weight_map"):
        if not isinstance(index.get(key), dict):
            raise ValueError(f'{path}: no "{key}" in it; Hugging Face readers fail without')
    weight_map, suffix = index["weight_map"], ".safetensors" if path.name == INDEX else ".bin"
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise ValueError(f"{path}: {name!r} is in {file!r}: must be the name of a file beside")
        if not file.endswith(suffix):
            raise ValueError(f"{path}: {name!r} is in {file!r}: must end in {suffix}")
    if missing := sorted(set(weight_map.values()) - names):
        raise FileNotFoundError(
            f"{path}: {len(missing)} of the {len(set(weight_map.values()))} parts that it names "
            f"are missing ({_some(missing)}); fetch them"
        )
    stem = path.name.split(".")[0]
    loose = {n for n in names if n == stem + suffix or fnmatch.fnmatch(n, f"{stem}-*-of-*{suffix}")}
    if loose := loose - set(weight_map.values()):
        raise ValueError(
            f"{path}: does not name {_some(loose)}, which lies beside its parts; remove what is old"
        )
    return weight_map


def _check_index(path, weight_map, tensors):
    """Raises if the parts do not hold exactly what the index says."""
    for name, file in weight_map.items():
        found = tensors[name].file if name in tensors else "no part"
        if found != file:
            raise ValueError(f"{path}: {name!r} should be in {file}, it is in {found}")
    if unknown := [name for name in tensors if name not in weight_map]:
        name = unknown[0]
        raise ValueError(
            f"{path}: does not name {len(unknown)} tensors of its parts ({name!r} in "
            f"{tensors[name].file}, …)"
        )


def _decoded(name, where):
    """A tensor's name in the training code."""
    try:
        return olmo_names.decode(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
