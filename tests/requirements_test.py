"""pyproject.toml (ranges) against the requirements files (tested pins) and the code's imports."""

import ast
import pathlib
import re
import sys
import tomllib

import pytest
from packaging import requirements, utils

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
# Import name → distribution, where they differ by more than case and punctuation.
DISTRIBUTIONS = {"absl": "absl-py", "orbax": "orbax-checkpoint", "yaml": "PyYAML"}
OPTIONAL = {"maxtext", "tokamax", "torch", "transformers"}  # peers and kernels, where installed
BESIDE = {"serving"}  # what scripts of benchmarking/peers import from their own folder


def _pins(file, python):
    """Distribution → version that `file` pins on `python`, files that it includes counted in."""
    pins = {}
    for line in (ROOT / file).read_text().splitlines():
        if included := re.fullmatch(r"-r (\S+)", line):
            pins |= _pins(included[1], python)
        elif line and not line.startswith("#"):
            requirement = requirements.Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
                continue
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{file}: {line} is not a pin"
            pins[utils.canonicalize_name(requirement.name)] = specifier.version
    return pins


def _ranges(lines):
    parsed = [requirements.Requirement(line) for line in lines]
    return {utils.canonicalize_name(r.name): r.specifier for r in parsed}


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_and_ranges_name_the_same_packages_and_agree(python):
    pins, ranges = _pins("requirements.txt", python), _ranges(PROJECT["dependencies"])
    assert set(pins) == set(ranges)
    assert [name for name, version in pins.items() if version not in ranges[name]] == []


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("file", "extra"),
    [
        ("requirements-test.txt", "test"),
        ("requirements-oracles.txt", "oracles"),
        ("requirements-cuda.txt", "cuda"),
        ("requirements-tpu.txt", "tpu"),
    ],
)
def test_extras_agree_with_their_files(file, extra, python):
    pins, ranges = _pins(file, python), _ranges(PROJECT["optional-dependencies"][extra])
    for name, specifier in ranges.items():
        assert name in pins and pins[name] in specifier, (file, name)


def test_the_lock_has_the_pins():
    locked = _pins("requirements-lock.txt", "3.11")
    assert locked | _pins("requirements-test.txt", "3.11") == locked


def test_supported_pythons_are_those_tested():
    requires = requirements.Requirement(f"python{PROJECT['requires-python']}").specifier
    assert [f"3.{minor}" for minor in range(9, 20) if f"3.{minor}" in requires] == list(PYTHONS)


def test_every_import_is_a_dependency_and_every_dependency_is_imported():
    imported = set()
    for path in [*ROOT.glob("olmoe_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            imported |= {name.split(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, "olmoe_jax", "experiments", *BESIDE}
    imported = {utils.canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in imported}
    # Read through others: the C++ half of JAX, the file format behind TFDS and grain.
    needed = imported - OPTIONAL | {"jaxlib", "array-record"}
    assert needed == set(_ranges(PROJECT["dependencies"]))
