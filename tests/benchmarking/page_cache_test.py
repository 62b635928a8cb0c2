"""Pages that are forgotten and read again."""

import os

import pytest

from olmoe_jax.benchmarking import page_cache

MB = 1 << 20


def test_pages_of_files_are_forgotten_and_read_again(tmp_path, monkeypatch):
    if not hasattr(os, "RWF_NOWAIT") or not hasattr(os, "posix_fadvise"):
        pytest.skip("needs Linux's page cache")
    (tmp_path / "below").mkdir()
    for name in ("a", "below/b"):
        (tmp_path / name).write_bytes(os.urandom(3 * MB))
    asked, advise = [], os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: (asked.append(args[1:]), advise(*args)))
    page_cache.forget(tmp_path)
    assert asked == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2
    gone = page_cache.resident_share(tmp_path)
    page_cache.read_once(tmp_path)
    there = page_cache.resident_share(tmp_path)
    if there == gone:
        pytest.skip("this file system keeps its pages elsewhere")
    assert gone < 0.9 and there == 1
