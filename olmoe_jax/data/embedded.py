"""A real corpus without a download: documents out of what every installation of this project holds.

  c_headers      C and C++ headers of the installed packages
  docstrings     prose: what modules say about themselves, a document per module, without examples
  documentation  prose: the language reference that `help()` shows, package descriptions, README
                 files, licences
  interfaces     type stubs and protocol buffer definitions
  python_code    the standard library and the packages, docstrings left out

The same for the same installation: files are taken in the order of a hash of their name until the
domain's budget is full, and no time, user or absolute path enters a text or an id.
"""

import ast
import hashlib
import importlib.metadata
import pathlib
import platform
import re
import sysconfig

from olmoe_jax.data import corpora, deduplication, prose

BUDGETS = {  # bytes of text per domain, before deduplication
    "c_headers": 1_500_000,
    "docstrings": 3_000_000,
    "documentation": 2_500_000,
    "interfaces": 1_000_000,
    "python_code": 5_000_000,
}
MIN_FILE_BYTES, MAX_FILE_BYTES = 1_000, 80_000
MIN_DOCUMENT_BYTES = 300
HEADER_SUFFIXES = (".h", ".hpp", ".cuh")
INTERFACE_SUFFIXES = (".pyi", ".proto")
NOTE_SUFFIXES = (".md", ".rst")
_SKIPPED_PARTS = frozenset(
    "test tests testing _vendor vendor idlelib lib2to3 encodings pydoc_data turtledemo "
    "site-packages dist-packages ensurepip __pycache__ node_modules unidata".split()
)
_SKIPPED_FILE = re.compile(
    r"(_test|_tests|_pb2|_pb2_grpc|_gen|_generated|conftest)\.pyi?$|^test_|^_?unicode|^_sysconfigdata"
)
# This project, and the plotting library of its reports with what that needs: 17 MB of generated
# classes, which would crowd out what people wrote.
_LEFT_OUT = ("olmoe-jax", "plotly", "narwhals")


def build() -> list[corpora.Document]:
    """All documents, deduplicated, sorted by id."""
    return deduplication.deduplicate(collect())


def collect() -> list[corpora.Document]:
    """All documents before deduplication, sorted by id."""
    distributions = _distributions()
    files = _files(distributions)
    documents = [*_python(files), *_documentation(files, distributions)]
    documents += _whole(files, "c_headers", HEADER_SUFFIXES)
    documents += _whole(files, "interfaces", INTERFACE_SUFFIXES)
    return sorted(documents, key=lambda d: d.id)


def fingerprint() -> str:
    """What the corpus depends on: the Python version and the installed distributions."""
    installed = "\n".join(_distributions())
    return hashlib.sha256(f"{_python_version()}\n{installed}".encode()).hexdigest()


def _python_version():
    return f"python {platform.python_version()}"


def _distributions():
    """{"name version": distribution} of what is installed, _LEFT_OUT apart, sorted."""
    found = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata  # parsed at every access
        name = (metadata["Name"] or "").replace("_", "-").lower()
        if name and name not in _LEFT_OUT:
            found.setdefault(f"{name} {metadata['Version']}", distribution)
    return dict(sorted(found.items()))


def _files(distributions):
    """{name relative to its root: (path, source)}, in the order of a hash of the name."""
    found = {}
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        found[f"python/{path.relative_to(root).as_posix()}"] = (path, _python_version())
    for source, distribution in distributions.items():
        for file in distribution.files or ():
            if file.name.endswith((".py", *HEADER_SUFFIXES, *INTERFACE_SUFFIXES, *NOTE_SUFFIXES)):
                found[file.as_posix()] = (pathlib.Path(distribution.locate_file(file)), source)
    names = filter(_wanted, found)
    return {n: found[n] for n in sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest())}


def _wanted(name):
    parts = name.split("/")
    if ".." in parts or _SKIPPED_FILE.search(parts[-1]):
        return False
    return not any(p in _SKIPPED_PARTS or p.startswith(".") for p in parts[:-1])


def _read(path, least=MIN_FILE_BYTES):
    """Text of a file of acceptable size, or None."""
    try:
        if not least <= path.stat().st_size <= MAX_FILE_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _whole(files, domain, suffixes):
    """Whole files with one of the suffixes, up to the domain's budget."""
    left = BUDGETS[domain]
    for name, (path, source) in files.items():
        if left > 0 and name.endswith(suffixes) and (text := _read(path)) is not None:
            text = without_head_comment(text)
            left -= len(text.encode())
            yield corpora.Document(f"{domain}/{name}", text, source, domain)


def _python(files):
    """Documents of python_code and docstrings: of each module one each, while budgets last."""
    left = {d: BUDGETS[d] for d in ("python_code", "docstrings")}
    for name, (path, source) in files.items():
        if max(left.values()) <= 0:
            return
        if not name.endswith(".py") or (text := _read(path)) is None:
            continue
        try:
            code, docstrings = split_docstrings(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        said = _joined(p for d in docstrings for p in prose.paragraphs(d))
        for domain, text in (("python_code", without_head_comment(code)), ("docstrings", said)):
            if left[domain] > 0 and len(text) >= MIN_DOCUMENT_BYTES:
                left[domain] -= len(text.encode())
                yield corpora.Document(f"{domain}/{name}", text, source, domain)


def split_docstrings(source) -> tuple[str, list[str]]:
    """(source without its docstrings, the docstrings in order).

    A body that is only a docstring becomes `...`, so that the code stays code.
    """
    cuts, docstrings, pending = [], [], [ast.parse(source)]
    while pending:
        node = pending.pop()
        body = getattr(node, "body", ())
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and body
        ):
            value = body[0].value if isinstance(body[0], ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                alone = len(body) == 1 and not isinstance(node, ast.Module)
                cuts.append((value.lineno, value.end_lineno, value.col_offset if alone else None))
                docstrings.append((value.lineno, value.value))
        # statements only: walking expressions takes seconds
        for field in ("body", "orelse", "finalbody", "handlers"):
            children = getattr(node, field, ())
            pending += children if isinstance(children, list) else ()
    lines = source.splitlines(keepends=True)
    for start, end, column in sorted(cuts, reverse=True):
        lines[start - 1 : end] = [] if column is None else [" " * column + "...\n"]
    return "".join(lines), [text for _, text in sorted(docstrings)]


def without_head_comment(text) -> str:
    """Drops the comments at the head of a file: a licence, the same in hundreds of files."""
    text = text.lstrip("\ufeff \n")
    if text.startswith("/*") and "*/" in text:
        text = text[text.index("*/") + 2 :]
    lines = text.splitlines(keepends=True)
    start = 0
    while start < len(lines) and (
        not lines[start].strip() or lines[start].startswith(("#!", "# ", "#\n", "//"))
    ):
        start += 1
    return "".join(lines[start:])


def _documentation(files, distributions):
    """Prose documents of all kinds, up to the domain's budget."""
    left = BUDGETS["documentation"]
    for name, text, source in _written(files, distributions):
        text = _joined(prose.paragraphs(text)) if text else ""
        if len(text) >= MIN_DOCUMENT_BYTES and left > 0:
            left -= len(text.encode())
            yield corpora.Document(f"documentation/{name}", text, source, "documentation")


def _written(files, distributions):
    """(name, text, source) of language reference, README files, descriptions and licences."""
    try:
        from pydoc_data import topics  # some distributions of Python leave it out
    except ImportError:
        topics = None
    for name, text in sorted(topics.topics.items() if topics else ()):
        yield f"python/topics/{name}", text, _python_version()
    for name, (path, source) in files.items():
        if name.endswith(NOTE_SUFFIXES):
            yield name, _read(path, MIN_DOCUMENT_BYTES), source
    for source, distribution in distributions.items():
        metadata = distribution.metadata
        yield (
            f"{source.split()[0]}/description",
            metadata.get_payload() or metadata.get("Description", ""),
            source,
        )
        for file in distribution.files or ():
            if "licen" in file.name.lower() and not file.name.endswith(
                (".py", ".pyc", *NOTE_SUFFIXES)
            ):
                yield file.as_posix(), _read(pathlib.Path(distribution.locate_file(file))), source


def _joined(paragraphs):
    return "\n\n".join(paragraphs) + "\n"
