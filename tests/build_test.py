"""BUILD is the import law: every file in one target, every import in that target's deps.

BUILD is plain enough to be run as Python. A failure over deps ends with the list that is right; a
dep that nothing imports fails as well.
"""

import ast
import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
RUN = "tests/run_pytest.py"  # the main of every py_test
# Import name → distribution, where BUILD's requirement() is not called as the module.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
    "yaml": "PyYAML",
}
# Peers and kernels, imported where they are installed: nothing depends on them.
OPTIONAL = ("tokamax", "torch", "transformers")
# What scripts of olmoe_jax/benchmarking/peers import from their own folder.
BESIDE = ("serving",)


@functools.cache
def targets():
    """Name → {kind, srcs, deps, …} of every target in BUILD."""
    found = {}

    def rule(kind):
        def declare(name, **attributes):
            assert name not in found, f"BUILD has two targets {name}"
            found[name] = {"kind": kind, "srcs": [], "deps": []} | attributes

        return declare

    def glob(patterns, exclude=()):
        paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
        paths -= {path for pattern in exclude for path in ROOT.glob(pattern)}
        return sorted(str(path.relative_to(ROOT)) for path in paths)

    names = {kind: rule(kind) for kind in ("py_library", "py_binary", "py_test")}
    names |= {"glob": glob, "load": lambda *_: None, "requirement": lambda name: f"@{name}"}
    names |= {"package": lambda **_: None, "exports_files": lambda _: None}
    exec(compile((ROOT / "BUILD").read_text(), "BUILD", "exec"), names)
    return found


def python_files():
    """Every .py file of the project, relative to the root."""
    files = [p for top in ("olmoe_jax", "experiments", "tests") for p in (ROOT / top).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in files)


@functools.cache
def owners():
    """File → names of the targets that have it as a source."""
    found = {}
    for name, target in targets().items():
        for file in target["srcs"]:
            found.setdefault(file, []).append(name)
    return found


def _module_file(module):
    """The project's file that defines `module`, or None."""
    path = module.replace(".", "/")
    for file in (f"{path}.py", f"{path}/__init__.py"):
        if (ROOT / file).is_file():
            return file
    return None


def imported(file):
    """Labels that `file` needs in its deps: ":target" or "@distribution"."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC":
            table = ast.literal_eval(node.value)  # olmoe_jax/__init__.py imports at first use
            modules |= {f"olmoe_jax.{module or name}" for name, module in table.items()}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                modules.add(module if _module_file(module) else node.module)
    labels = set()
    for module in modules:
        top = module.split(".")[0]
        if top in ("olmoe_jax", "experiments", "tests"):
            if source := _module_file(module):
                labels |= {f":{name}" for name in owners().get(source, [])}
        elif top not in (*sys.stdlib_module_names, *OPTIONAL, *BESIDE):
            labels.add(f"@{DISTRIBUTIONS.get(top, top)}")
    return labels


def _needed(name):
    """The deps that a target's imports ask for."""
    files = [file for file in targets()[name]["srcs"] if file != RUN]
    return set().union(*(imported(file) for file in files)) - {f":{name}"}


def _starlark(labels):
    written = [f'requirement("{x[1:]}")' if x[0] == "@" else f'"{x}"' for x in sorted(labels)]
    return f"[{', '.join(written)}]"


def test_every_file_is_in_exactly_one_target():
    wrong = [f"{f} is in {owners().get(f, 'no target')}" for f in python_files() if f != RUN
             and len(owners().get(f, [])) != 1]  # fmt: skip
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_source_exists():
    assert [file for file in owners() if not (ROOT / file).is_file()] == []


def test_deps_are_the_imports():
    wrong = []
    for name, target in targets().items():
        given, needed = set(target["deps"]), _needed(name)
        if target["kind"] == "py_test":  # every test has these two, imported or not
            given -= {":test_support", "@pytest"}
            needed -= {":test_support", "@pytest"}
        if given != needed:
            missing, unused = sorted(needed - given), sorted(given - needed)
            wrong.append(f"{name}: missing {missing}, unused {unused}; deps = {_starlark(needed)}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_deps_exist_and_run_one_way():
    graph = {
        name: [dep[1:] for dep in target["deps"] if dep[0] == ":"]
        for name, target in targets().items()
    }
    assert [dep for deps in graph.values() for dep in deps if dep not in graph] == []
    done = set()

    def visit(name, above):
        assert name not in above, f"cycle: {' → '.join([*above, name])}"
        if name not in done:
            for dep in graph[name]:
                visit(dep, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_nothing_below_depends_on_a_binary_or_a_test():
    for name, target in targets().items():
        kinds = {targets()[dep[1:]]["kind"] for dep in target["deps"] if dep[0] == ":"}
        allowed = {"py_library", "py_binary"} if target["kind"] == "py_test" else {"py_library"}
        assert kinds <= allowed, name


def test_every_binary_and_every_test_has_its_target():
    kinds = {file: targets()[names[0]]["kind"] for file, names in owners().items() if file != RUN}
    for file in python_files():
        if file.startswith("experiments/") and "app.run(" in (ROOT / file).read_text():
            if file != "experiments/app.py":
                assert kinds.get(file) == "py_binary", file
        if re.fullmatch(r"tests/.*_test\.py", file):
            assert kinds.get(file) == "py_test", file


def test_requirements_are_pinned():
    pinned = set()
    for file in ("requirements.txt", "requirements-test.txt", "requirements-oracles.txt"):
        pinned |= set(re.findall(r"^([\w-]+)==", (ROOT / file).read_text(), re.MULTILINE))
    used = {dep[1:] for target in targets().values() for dep in target["deps"] if dep[0] == "@"}
    # packaging comes with pytest; MaxText, a peer, has an environment of its own
    assert used - {"packaging", "maxtext"} <= pinned


def test_no_second_build_file_hides_a_folder():
    hidden = [path for top in ("olmoe_jax", "experiments", "tests")
              for path in (ROOT / top).rglob("BUILD*")]  # fmt: skip
    assert hidden == []
