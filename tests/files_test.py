"""Locks and files that are whole or absent."""

import threading

import pytest

from olmoe_jax import files


def test_a_file_is_there_whole_and_alone_in_a_folder_that_was_made(tmp_path):
    path = tmp_path / "new" / "page.html"
    for text in ("text", "höher"):
        files.write_text(path, text)
        assert path.read_text(encoding="utf-8") == text and list(path.parent.iterdir()) == [path]


def test_what_fails_halfway_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        with files.whole(path) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_one_at_a_time_holds_a_lock_and_the_others_wait(tmp_path):
    path, waits, done = tmp_path / "lock", threading.Event(), []

    def second():
        with files.locked(path, waiting=waits.set):
            done.append("second")

    other = threading.Thread(target=second)
    with files.locked(path, waiting=lambda: done.append("first waited")):
        other.start()
        assert waits.wait(10)
        with path.open() as file:
            assert not files.try_lock(file)
        done.append("first")
    other.join()
    assert done == ["first", "second"]
    with path.open() as file:
        assert files.try_lock(file)
