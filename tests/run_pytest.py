"""Runs pytest on the files named as arguments: what each `py_test` of BUILD starts.

A pytest file run bare defines its tests, runs none and exits with 0.
"""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["--import-mode=importlib", "-p", "no:cacheprovider", *sys.argv[1:]]))
