"""Locks and files that are whole or absent."""

import threading

from olmoe_jax import files


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
