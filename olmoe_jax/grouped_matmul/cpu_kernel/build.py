"""Compiles the kernel with the machine's C++ compiler, against the headers that come with JAX."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

import jax
import jaxlib

FOLDER = pathlib.Path(__file__).parent
SOURCES = (
    "binding.cc", "product.cc", "product.h", "vectors.h", "packing.h", "vector_tiles.h",
    "matrix_tiles.h",
)  # fmt: skip
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# Of each compiled file; binding.cc must run on any processor, to say what it has.
WIDTHS = {
    "amx_bf16": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": (*AVX512, "-mavx512bf16"),
    "avx512": AVX512,
    "avx2": AVX2,
}


def unsupported() -> str | None:
    """Why there is no kernel for this kind of machine, as a sentence; None if there is."""
    machine = (platform.system(), platform.machine())
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the compiled kernel exists for Linux on x86-64 only; this is {' '.join(machine)}"
    return None


def compiler() -> str | None:
    """The C++ compiler: the environment's CXX, else the first of COMPILERS that is there."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def library() -> pathlib.Path:
    """Where the library of this source for this jaxlib is, or would be."""
    digest = hashlib.sha256(repr((FLAGS, WIDTHS)).encode())
    for name in SOURCES:
        digest.update((FOLDER / name).read_bytes())
    return FOLDER / "build" / f"kernel-{jaxlib.__version__}-{digest.hexdigest()[:12]}.so"


@functools.cache
def load() -> ctypes.CDLL:
    """The library.

    Raises:
      OSError: it is not there or not loadable.
    """
    return ctypes.CDLL(str(library()))


def build() -> pathlib.Path:
    """Compiles the library if it is not there, whole or not at all, and returns its path.

    Raises:
      FileNotFoundError: no C++ compiler.
      ValueError: not Linux on x86-64, or the compiler fails; with its first error.
      OSError: the folder cannot be written.
    """
    target = library()
    if reason := unsupported():
        raise ValueError(reason)
    if target.exists():
        return target
    cxx = compiler()
    if cxx is None:
        names = os.environ.get("CXX") or ", ".join(COMPILERS)
        raise FileNotFoundError(f"no C++ compiler ({names}): install one, or set CXX")
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        jobs = [(f"{folder}/binding.o", ("-isystem", jax.ffi.include_dir(), FOLDER / "binding.cc"))]
        for width, flags in WIDTHS.items():
            name = f"-DMULTIPLY=multiply_{width}"
            jobs.append((f"{folder}/{width}.o", (*flags, name, FOLDER / "product.cc")))
        running = [
            subprocess.Popen(
                [cxx, *FLAGS, "-c", "-o", out, *rest], stderr=subprocess.PIPE, text=True
            )
            for out, rest in jobs
        ]
        errors = [process.communicate()[1] for process in running]
        _check(cxx, errors, [process.returncode for process in running])
        objects = [out for out, _ in jobs]
        whole = f"{folder}/whole.so"
        linked = subprocess.run(
            [cxx, "-shared", "-o", whole, *objects], stderr=subprocess.PIPE, text=True
        )
        _check(cxx, [linked.stderr], [linked.returncode])
        os.replace(whole, target)
    return target


def _check(cxx, errors, statuses):
    for error, status in zip(errors, statuses, strict=True):
        if status:
            lines = [line for line in error.splitlines() if "error" in line] or [f"status {status}"]
            raise ValueError(f"{cxx} cannot compile the kernel: {lines[0]}")
