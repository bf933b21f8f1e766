"""Docstrings: every public name has one, every parameter is explained, every example runs as it is typed."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import pyrosc
from pyrosc import plots

PACKAGE = Path(pyrosc.__file__).parent
DOORS = {
    "": pyrosc,
    "criticism.": pyrosc.criticism,
    "datasets.": pyrosc.datasets,
    "distributions.": pyrosc.distributions,
    "plots.": plots,
}


def public_things():
    """Yield (name, function or class) of all that stands behind a door."""
    for prefix, door in DOORS.items():
        for name in door.__all__:
            thing = getattr(door, name)
            if not inspect.ismodule(thing):
                yield prefix + name, thing


def public_members():
    """Yield (name, object) of modules, functions, classes and methods without an underscore."""
    for info in pkgutil.walk_packages([str(PACKAGE)], "pyrosc."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        yield module.__name__, module
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(thing):
                yield f"{module.__name__}.{name}", thing
            elif inspect.isclass(thing):
                yield f"{module.__name__}.{name}", thing
                for method, inner in vars(thing).items():
                    target = inner.__func__ if isinstance(inner, (classmethod, staticmethod)) else inner
                    is_ours = inspect.isfunction(target) and target.__qualname__.startswith(thing.__name__)
                    if not method.startswith("_") and (is_ours or isinstance(target, property)):
                        yield f"{module.__name__}.{name}.{method}", target


def test_every_public_name_has_a_docstring():
    bare = [name for name, thing in public_members() if not (getattr(thing, "__doc__", "") or "").strip()]
    assert not bare


# --- parameters


def documented(doc):
    """Return the names that a numpydoc section of parameters explains."""
    section = re.search(r"^\s*Parameters\n\s*-+\n(.*?)(?=\n\s*\n?\s*\w[\w ]*\n\s*---|\Z)", doc, re.S | re.M)
    if section is None:
        return set()
    lines = section.group(1).splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    heads = [line.strip() for line in lines if line.strip() and len(line) - len(line.lstrip()) == margin]
    return {name.strip(" *") for head in heads for name in head.split(" : ")[0].split(",")}


def verbs():
    """Yield (name, signature, docstring) of all that a user calls."""
    for name, thing in public_things():
        if inspect.isfunction(thing) or name.partition(".")[2]:
            yield name, inspect.signature(thing), thing.__doc__
        else:
            methods = [method for method in ("for_data", "save") if hasattr(thing, method)]
            for method in methods:
                bound = getattr(thing, method)
                yield f"{name}.{method}", inspect.signature(bound), bound.__doc__
            if "for_data" in methods:
                yield name, inspect.signature(thing), thing.__doc__


@pytest.mark.parametrize(
    ("name", "signature", "doc"), list(verbs()), ids=lambda v: v if isinstance(v, str) and len(v) < 40 else ""
)
def test_every_parameter_of_a_verb_is_documented(name, signature, doc):
    wanted = {p for p in signature.parameters if p not in ("self", "cls", "args", "kwargs")}
    missing = wanted - documented(inspect.cleandoc(doc))
    assert not missing, f"{name} does not document {sorted(missing)}"


# --- examples


def examples_of(source, module):
    """Yield the doctest of each docstring that has one. It starts with nothing, as a reader does."""

    def walk(node, name):
        doc = ast.get_docstring(node) or ""
        if ">>>" in doc:
            start = node.body[0].lineno - 1
            yield doctest.DocTestParser().get_doctest(doc, {}, name, f"{module}.py", start)
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from walk(child, f"{name}.{child.name}")

    yield from walk(ast.parse(source), module)


def all_examples():
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        yield from examples_of(path.read_text(), module)


def failures_of(example):
    said = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    return "".join(said)


@pytest.mark.parametrize("example", list(all_examples()), ids=lambda e: e.name.removeprefix("pyrosc."))
def test_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = failures_of(example)
    assert not said, said


def test_a_wrong_example_would_be_noticed():
    source = 'class A:\n    def f(self):\n        """Act.\n\n        >>> 1 + 1\n        3\n        """'
    (example,) = examples_of(source, "pyrosc.a")
    assert example.name == "pyrosc.a.A.f"
    assert 'File "pyrosc.a.py", line 5' in failures_of(example)
    assert "Expected:\n    3\nGot:\n    2" in failures_of(example)


@pytest.mark.parametrize(
    ("name", "thing"), list(public_things()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_users_call_has_an_example(name, thing):
    methods = vars(thing).values() if inspect.isclass(thing) else ()
    docs = [getattr(part, "__doc__", None) or "" for part in (thing, *methods)]
    assert any(">>>" in doc for doc in docs), f"{name} shows no example"
