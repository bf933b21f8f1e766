"""The house rules: layers, inheritance, docstrings, pickle, print, light imports, running examples."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyrosc

PACKAGE = Path(pyrosc.__file__).parent
ROOT = Path(__file__).parents[1]
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A file imports from layers below its own only; those of a layer do not know each other.
LAYERS = [
    {"kernels", "cuda"},
    {"compiled"},
    {"random", "cells", "datasets", "distributions", "sparse", "spike_slab"},
    {"counts"},
    {"reading"},
    {"networks"},
    {"priors", "library", "likelihoods", "transforms", "components"},
    {"models.*"},
    {"models"},
    {"programs"},
    {"fusing", "tracing"},
    {"calling"},
    {"objective", "optimiser", "precision", "recording"},
    {"training"},
    {"svi"},
    {"persist"},
    {"asking"},
    {"rates"},
    {"summaries"},
    {"imputed"},
    {"posterior", "imputation", "multiple", "evidence", "states"},
    {"variation", "query"},
    {"replicates"},
    {"shrinkage"},
    {"groups"},
    {"differential", "criticism", "ranking"},
    {"calibration", "interactions", "sets"},
    {"plots"},
    {"cli"},
    {"__main__"},
]
# Where users look for it: fit.save(...).
EXCEPTIONS = {("svi", "pyrosc.persist", "save")}


def module_of(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer_of(module):
    name = "models.*" if module.startswith("models.") else module
    for i, layer in enumerate(LAYERS):
        if name in layer:
            return i
    return pytest.fail(f"{module} has no layer: give it one in LAYERS")


def imports_of(tree, is_package=False):
    """Yield (module of ours, name of the enclosing function or None, at runtime) for each import."""

    def walk(node, function):
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            if isinstance(child, ast.Import):
                yield from ((alias.name, function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    is_module = (PACKAGE.parent / whole.replace(".", "/")).with_suffix(".py").exists()
                    is_folder = (PACKAGE.parent / whole.replace(".", "/")).is_dir()
                    yield (whole if is_module or is_folder else child.module, function)
            yield from walk(child, inside)

    for name, function in walk(tree, None):
        if name == "pyrosc" or name.startswith("pyrosc."):
            yield name, function


def public_modules():
    for info in pkgutil.walk_packages([str(PACKAGE)], "pyrosc."):
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def classes_of_ours():
    for module in public_modules():
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__:
                yield cls


def public_members():
    """Yield (name, object) of every public module, function, class and method."""
    for module in public_modules():
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


# --- layers


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_file_imports_only_from_layers_below(path):
    module = module_of(path)
    if module == "__init__":
        return
    own = layer_of(module)
    for name, function in imports_of(ast.parse(path.read_text())):
        if (module, name, function) in EXCEPTIONS:
            continue
        if name == "pyrosc":
            assert module in ("cli", "__main__"), f"{module} imports the whole of pyrosc"
            continue
        target = name.removeprefix("pyrosc.")
        assert layer_of(target) < own, f"{module} imports {target}, which is not below it"


def test_the_layers_would_notice():
    (name, function), *_ = imports_of(ast.parse("def save():\n    from pyrosc.persist import save"))
    assert (name, function) == ("pyrosc.persist", "save")
    assert layer_of("persist") > layer_of("svi")
    names = [
        name for name, _ in imports_of(ast.parse("from pyrosc import models\nimport pyrosc.svi\nimport re"))
    ]
    assert names == ["pyrosc.models", "pyrosc.svi"]


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("[a-z]*.py")), ids=module_of)
def test_models_never_import_each_other(path):
    assert not [
        name for name, _ in imports_of(ast.parse(path.read_text())) if name.startswith("pyrosc.models")
    ]


def test_no_class_of_ours_inherits_from_another_of_ours():
    for cls in classes_of_ours():
        ours = [base.__name__ for base in cls.__mro__[1:] if base.__module__.startswith("pyrosc")]
        assert not ours, f"{cls.__name__} inherits from {ours}"


# --- docstrings


def test_every_public_name_has_a_docstring():
    bare = [name for name, thing in public_members() if not (getattr(thing, "__doc__", "") or "").strip()]
    assert not bare


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
    for name in pyrosc.__all__:
        thing = getattr(pyrosc, name)
        if inspect.isfunction(thing):
            yield name, inspect.signature(thing), thing.__doc__
        elif inspect.ismodule(thing):
            for inner in getattr(thing, "__all__", [n for n in vars(thing) if n[0] != "_"]):
                target = getattr(thing, inner)
                if (inspect.isfunction(target) and target.__module__ == thing.__name__) or (
                    inspect.isclass(target) and target.__module__ == thing.__name__
                ):
                    yield f"{name}.{inner}", inspect.signature(target), target.__doc__
        elif inspect.isclass(thing):
            for method in ("for_data", "save"):
                if hasattr(thing, method):
                    bound = getattr(thing, method)
                    yield f"{name}.{method}", inspect.signature(bound), bound.__doc__
            if hasattr(thing, "for_data"):
                yield name, inspect.signature(thing), thing.__doc__


@pytest.mark.parametrize(
    ("name", "signature", "doc"), list(verbs()), ids=lambda v: v if isinstance(v, str) and len(v) < 40 else ""
)
def test_every_parameter_of_a_verb_is_documented(name, signature, doc):
    wanted = {p for p in signature.parameters if p not in ("self", "cls", "args", "kwargs")}
    missing = wanted - documented(inspect.cleandoc(doc))
    assert not missing, f"{name} does not document {sorted(missing)}"


# --- what is not done


def names_and_calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield f"{getattr(node.value, 'id', '')}.{node.attr}"
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.name for alias in node.names)
            yield getattr(node, "module", "") or ""


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_pickle_no_global_seed_and_no_bare_print(path):
    used = set(names_and_calls(ast.parse(path.read_text())))
    assert not used & {"pickle", "cloudpickle", "dill", "joblib", "torch.load", "torch.save", "shelve"}
    assert not used & {"eval", "exec", "torch.manual_seed", "pyro.set_rng_seed", "pyro.clear_param_store"}
    if module_of(path) not in ("cli", "__main__"):
        assert "print" not in used


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_path_of_a_machine(path):
    assert not re.search(r"[\"'](/home|/work|/Users|/root|C:\\\\)", path.read_text())


def run(*arguments, timeout=60, cwd=None):
    """Run Python in a process of its own, this pyrosc first on its path."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=cwd,
        check=False,
    )


def test_importing_pyrosc_is_light_and_leaves_the_process_alone():
    code = (
        "import numpy as np, torch, pyro, sys\n"
        "before = (torch.get_rng_state().sum(), np.random.get_state()[1].sum(), pyro.settings.get(),"
        " torch.get_num_threads())\n"
        "import pyrosc\n"
        "after = (torch.get_rng_state().sum(), np.random.get_state()[1].sum(), pyro.settings.get(),"
        " torch.get_num_threads())\n"
        "assert before == after\n"
        "heavy = {'scanpy', 'scvi', 'lightning', 'jax', 'matplotlib.pyplot', 'mpmath', 'beartype'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = run("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_all_names_exist_and_are_sorted():
    assert pyrosc.__all__ == sorted(pyrosc.__all__, key=lambda n: (n.upper() != n, n[0].islower(), n))
    assert all(hasattr(pyrosc, name) for name in pyrosc.__all__)


# --- examples and benchmarks

SCRIPTS = sorted(
    {*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")} - {ROOT / "benchmarks/common.py"}
)


def test_importing_pyrosc_imports_nothing_that_takes_long_beside_what_it_is_built_on():
    before = "import sys, torch, pyro, anndata; before = {*sys.modules}; "
    script = before + "import pyrosc; print(*{*sys.modules} - before)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    slow = {
        "scipy.stats",
        "scipy.signal",
        "scipy.interpolate",
        "scipy.optimize",
        "sklearn",
        "matplotlib",
        "numba",
    }
    assert not slow & {*run.stdout.split()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_examples_and_benchmarks_run(script, tmp_path):
    done = run(str(script), "--smoke", timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
