"""Tensor names in the unsharded safetensors of allenai/OLMo: base64 of a pickle, never unpickled.

A name there is urlsafe-base64(pickle((path, is_pickled))), path a tuple of strings, is_pickled
whether the tensor is the pickle of something else. The few opcodes that such a pickle has are
walked here; any other is refused, so that no name can run code.
Source: allenai/OLMo `olmo/safetensors_util.py`.
"""

import base64
import binascii
import pickle
import pickletools

_EMPTY = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BOOLS = {"NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


def decode(name) -> str:
    """`transformer.blocks.0.att_proj.weight` of its encoded name; the parts of a path get dots.

    Raises:
      ValueError: the name is no such pickle, has an opcode that these names do not need, or stands
        for a pickled value.
    """
    try:
        data = base64.b64decode(name.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise _refused(name, "it is not base64") from None
    value = _walk(data, name)
    if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], bool)):
        raise _refused(name, "it does not hold a path and a flag")
    path, is_pickled = value
    if not isinstance(path, tuple) or not path or not all(isinstance(p, str) for p in path):
        raise _refused(name, "its path is not a tuple of strings")
    dotted = ".".join(path)
    if is_pickled:
        raise _refused(name, f"{dotted} is a pickled value, which could run code")
    return dotted


def encode(name) -> str:
    """The encoded name, byte for byte as allenai/OLMo writes that of a flat state dict."""
    data = pickle.dumps(((name,), False), protocol=4)
    return base64.urlsafe_b64encode(data).decode("ascii")


def _walk(data, name):
    """The value of a pickle of strings, flags and tuples."""
    stack, memo = [], []
    try:
        for opcode, argument, position in pickletools.genops(data):
            kind = opcode.name
            if kind in ("PROTO", "FRAME"):
                continue
            if kind == "STOP":
                if position + 1 != len(data) or len(stack) != 1:
                    raise _refused(name, "something follows its pickle")
                return stack[0]
            if kind in _STRINGS:
                stack.append(argument)
            elif kind in _BOOLS:
                stack.append(_BOOLS[kind])
            elif kind in _EMPTY:
                count = _EMPTY[kind]
                if _MARK in stack[len(stack) - count :] or len(stack) < count:
                    raise _refused(name, "its pickle is damaged")
                stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
            elif kind == "MARK":
                stack.append(_MARK)
            elif kind == "TUPLE":
                start = max(i for i, item in enumerate(stack) if item is _MARK)
                stack[start:] = [tuple(stack[start + 1 :])]
            elif kind == "MEMOIZE":
                memo.append(stack[-1])
            elif kind in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            else:
                raise _refused(name, f"its pickle has the opcode {kind}, which no name needs")
    except (IndexError, ValueError) as error:
        if isinstance(error, _Refused):
            raise
        raise _refused(name, "its pickle is damaged") from None
    raise _refused(name, "its pickle is damaged")


class _Refused(ValueError):
    pass


def _refused(name, why):
    shown = name if len(name) <= 60 else name[:57] + "…"
    return _Refused(f"tensor name {shown!r} cannot be decoded: {why}")
