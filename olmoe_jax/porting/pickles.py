"""Pickled weights, read through torch so that nothing in them can run."""

import shlex

import ml_dtypes  # noqa: F401  np.dtype("bfloat16") exists once it is imported


def read(path) -> dict:
    """{name: read-only mapped array} of a file that torch.save wrote.

    Raises:
      ValueError: it is none, holds something else than tensors, or no torch is there that reads it
        safely.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path}: pickled weights, which only torch reads; install torch, or pass a folder "
            "with safetensors"
        ) from None
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 6):
        raise ValueError(
            f"{path}: torch {torch.__version__} can be made to run code by a file, even with "
            "weights_only (CVE-2025-32434); install 2.6 or newer"
        )
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError(
                f"{path}: no zip archive, as torch.save writes since torch 1.6; if an older one "
                'wrote it, save it again: python -c "import sys, torch; f = sys.argv[1]; '
                f"torch.save(torch.load(f, 'cpu', weights_only=True), f)\" {shlex.quote(str(path))}"
            )
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a broken or hostile pickle fails in any way it likes
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path}: torch does not read it as weights: {reason[0] if reason else repr(error)}"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__}, expected a dict of tensors")
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    arrays = {}
    for name, value in content.items():
        tensor = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not tensor or not isinstance(name, str) or value.device.type != "cpu":
            raise ValueError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor")
        try:  # NumPy has no bfloat16 of its own, so the bytes cross as integers
            array = value.detach().view(integers[value.element_size()]).numpy()
            arrays[name] = array.view(str(value.dtype).removeprefix("torch."))
        except (KeyError, TypeError, RuntimeError):
            raise ValueError(f"{path}: {name!r} has dtype {value.dtype}, not supported") from None
        arrays[name].flags.writeable = False
    return arrays
