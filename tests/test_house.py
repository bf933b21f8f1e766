"""The house: rooms and the direction between them, sizes, names, and what is not done."""

import ast
import graphlib
import importlib
import inspect
import io
import pkgutil
import re
import tokenize
from pathlib import Path

import pytest

import pyrosc
from pyrosc import plots

PACKAGE = Path(pyrosc.__file__).parent

# Lowest first: a room imports from those before it only.
ROOMS = [
    "engine",
    "data",
    "datasets",
    "distributions",
    "nn",
    "models",
    "inference",
    "posterior",
    "reference_mapping",
    "differential",
    "criticism",
    "plots",
    "cli",
]
# They may import the whole package, and nothing imports them.
ABOVE = {"pyrosc.cli.command", "pyrosc.cli.demo", "pyrosc.__main__"}
# Where users look for it: fit.save(...).
EXCEPTIONS = {("pyrosc.inference.fit", "pyrosc.inference.storage")}
# What a room, or some of its modules, must not know besides. (`storage` looks models up by name.)
UNKNOWN = {
    "engine": {"pyro", "anndata", "pandas", "scanpy"},
    "data": {"pyro"},
    "inference": {"pyrosc.models"},
    "posterior": {"pyrosc.models"},
    "differential": {"pyrosc.models"},
    **{
        f"differential.{pure}": {"pyrosc.inference", "pyrosc.posterior", "pyro", "anndata"}
        for pure in (
            "group_sums",
            "dispersion",
            "donor_variance",
            "quasi_likelihood",
            "adaptive_shrinkage",
            "design",
            "calls",
        )
    },
}
KNOWN = {("pyrosc.inference.storage", "pyrosc.models")}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60

SOURCES = {
    ".".join(("pyrosc", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in SOURCES.items()}
each_module = pytest.mark.parametrize("module", SOURCES)


def room_of(module):
    return module.split(".")[1] if "." in module else ""


def imports_of(tree, modules):
    """Return all modules that a file imports, in functions too: of ours to the file, of others as written."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {whole if whole in modules else node.module for whole in wholes}
    return found


def graph_of(trees, exceptions=frozenset()):
    """Return {module: modules of ours that it imports}, less the exceptions."""
    return {
        module: {
            name
            for name in imports_of(tree, trees)
            if name.split(".")[0] == "pyrosc" and (module, name) not in exceptions
        }
        for module, tree in trees.items()
    }


def wrong_ways(graph):
    """Return the imports from a room that is not below the importing one."""
    floor = {room: i for i, room in enumerate(ROOMS)}
    return {
        f"{module} imports {name}"
        for module, names in graph.items()
        for name in names
        if module not in {"pyrosc", *ABOVE}
        and room_of(module) != room_of(name)
        and floor.get(room_of(module), -1) < floor.get(room_of(name), len(ROOMS))
    }


def cycle_of(graph):
    """Return the modules of a cycle of imports, first and last the same; nothing where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def unknown_imports(trees):
    """Return the imports of what a room or a module must not know."""
    return {
        f"{module} imports {name}"
        for place, names in UNKNOWN.items()
        for module, tree in trees.items()
        if (module + ".").startswith(f"pyrosc.{place}.")
        for name in imports_of(tree, trees)
        if any((name + ".").startswith(unknown + ".") and (module, unknown) not in KNOWN for unknown in names)
    }


# --- rooms


def test_nothing_stands_outside_of_a_room():
    outside = {module for module in SOURCES if room_of(module) not in {"", "__main__", *ROOMS}}
    assert not outside
    at_the_door = {path.stem for path in PACKAGE.glob("*.py")}
    assert at_the_door == {"__init__", "__main__", "reference_mapping"}


def test_a_room_imports_only_from_rooms_below():
    assert not wrong_ways(graph_of(TREES, EXCEPTIONS))


def test_imports_have_one_direction():
    assert not cycle_of(graph_of(TREES, EXCEPTIONS))


def test_no_exception_is_left_over():
    graph = graph_of(TREES)
    assert not {pair for pair in EXCEPTIONS if pair[1] not in graph[pair[0]]}


def test_rooms_do_not_know_what_they_need_not():
    assert not unknown_imports(TREES)


def test_models_do_not_import_each_other():
    for module in SOURCES:
        if room_of(module) == "models" and module not in ("pyrosc.models", "pyrosc.models.building"):
            others = {n for n in imports_of(TREES[module], TREES) if room_of(n) == "models"}
            assert others <= {"pyrosc.models.building"}, module


def house_of(**sources):
    return {f"pyrosc.{name.replace('__', '.')}": ast.parse(source) for name, source in sources.items()}


def test_imports_in_a_wrong_direction_would_be_noticed():
    wrong = house_of(
        engine__rng="from pyrosc.data.counts import Counts",
        data__counts="def f():\n    from pyrosc.datasets import simulate",
        datasets__simulate="import pyrosc",
        posterior__latent="from pyrosc import reference_mapping",
        reference_mapping="from pyrosc.posterior import latent",
        datasets="",
    )
    assert wrong_ways(graph_of(wrong)) == {
        "pyrosc.engine.rng imports pyrosc.data.counts",
        "pyrosc.data.counts imports pyrosc.datasets.simulate",
        "pyrosc.datasets.simulate imports pyrosc",
        "pyrosc.posterior.latent imports pyrosc.reference_mapping",
    }


def test_cycles_would_be_noticed_in_functions_and_within_a_room():
    round_about = house_of(
        data__counts="def f():\n    from pyrosc.data import read",
        data__read="from pyrosc.data.schema import Schema",
        data__schema="class Schema:\n    def of(self):\n        import pyrosc.data.counts as counts",
    )
    cycle = cycle_of(graph_of(round_about))
    assert set(cycle) == set(round_about)
    once = graph_of(round_about, {("pyrosc.data.counts", "pyrosc.data.read")})
    assert not cycle_of(once)


def test_forbidden_knowledge_would_be_noticed():
    wrong = house_of(
        engine__trace="def f():\n    import pyro.poutine",
        inference__svi="from pyrosc import models",
        inference__storage="from pyrosc import models",
        differential__calls="from pyrosc.inference.fit import Fit",
        differential__expression="from pyrosc.inference.fit import Fit",
        models="",
    )
    assert unknown_imports(wrong) == {
        "pyrosc.engine.trace imports pyro.poutine",
        "pyrosc.inference.svi imports pyrosc.models",
        "pyrosc.differential.calls imports pyrosc.inference.fit",
    }


def classes_of_ours():
    for info in pkgutil.walk_packages([str(PACKAGE)], "pyrosc."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            yield from (c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == info.name)


def test_no_class_of_ours_inherits_from_another_of_ours():
    for cls in classes_of_ours():
        ours = [base.__name__ for base in cls.__mro__[1:] if base.__module__.startswith("pyrosc")]
        assert not ours, f"{cls.__name__} inherits from {ours}"


# --- sizes


def lines_of_code(source):
    """Return the numbers of the lines that hold more than a comment."""
    idle = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {i for t in tokens if t.type not in idle for i in range(t.start[0], t.end[0] + 1)}


def long_functions(source):
    """Yield (name, lines of code without the docstring) of functions that have too many."""
    code = lines_of_code(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            doc = range(first.lineno, first.end_lineno + 1) if ast.get_docstring(node) else ()
            n = len(code & {*range(node.lineno, node.end_lineno + 1)} - {*doc})
            if n > MOST_LINES_OF_A_FUNCTION:
                yield node.name, n


@each_module
def test_files_and_functions_are_short(module):
    source = SOURCES[module].read_text()
    assert len(source.splitlines()) <= MOST_LINES
    assert not dict(long_functions(source))


def test_a_long_function_would_be_noticed():
    body = '    """Doc.\n\n    More.\n    """\n' + "    # why\n\n    a = (\n        1\n    )\n" * 20
    assert not dict(long_functions("def f():\n" + body.replace("a = (\n        1\n    )\n", "a = 1\n", 1)))
    assert dict(long_functions("def f():\n" + body)) == {"f": 61}


# --- names


def names_at_the_top(tree):
    """Return the functions, classes and values that a module defines at its top level, dunders left out."""

    def walk(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif not isinstance(node, (ast.For, ast.expr_context, ast.comprehension, ast.Lambda)):
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    return {name for name in walk(tree) if not name.startswith("__")}


def names_used_elsewhere(trees):
    """Return (module, name) for each name of ours that another module imports or reads as its attribute."""
    used = set()
    for own, tree in trees.items():
        found = set()
        here = {}  # what a name of this file stands for, where that is a module of ours
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    if whole in trees:
                        here[alias.asname or alias.name] = whole
                    found.add((node.module, alias.name))
            elif isinstance(node, ast.Import):
                here |= {alias.asname: alias.name for alias in node.names if alias.asname}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                target = here.get(node.value.id) if isinstance(node.value, ast.Name) else None
                found.add((target or ast.unparse(node.value), node.attr))
        used |= {(module, name) for module, name in found if module != own}
    return used


def public_names():
    """Return (module, name) of what users reach by a door, and of the parts that they build a model of."""
    doors = [pyrosc, pyrosc.criticism, pyrosc.datasets, pyrosc.distributions, plots]
    things = [(name, getattr(door, name)) for door in doors for name in door.__all__]
    parts = {
        (module, node.name)
        for module, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and room_of(module) in ("nn", "models")
    }
    command = {("pyrosc.cli.command", "main")}  # setup.cfg names it
    return parts | command | {(getattr(thing, "__module__", None), name) for name, thing in things}


def loose_names(trees, public):
    """Return what looks public and is used in its own file only."""
    used = names_used_elsewhere(trees)
    return {
        f"{module}.{name}"
        for module, tree in trees.items()
        for name in names_at_the_top(tree)
        if not name.startswith("_") and not {(module, name)} & (used | public)
    }


def borrowed_underscores(trees):
    """Return the names with an underscore that a module takes from another."""
    return {
        f"{module}.{name}"
        for module, name in names_used_elsewhere(trees)
        if module in trees and name.startswith("_") and not name.startswith("__")
    }


def test_what_is_not_public_and_not_imported_has_an_underscore():
    assert not loose_names(TREES, public_names())


def test_no_name_with_an_underscore_is_imported():
    assert not borrowed_underscores(TREES)


def test_names_would_be_noticed():
    wrong = house_of(
        engine__rng="SEED: int = 1\n_OWN = 2\ndef f(a, b=3):\n    inner = 4\n    return lambda c: inner",
        engine__adam="from pyrosc.engine import rng\nrng.f = rng._OWN\nOTHER, x = 1, 2",
        engine__trace="from pyrosc.engine.adam import OTHER\nx = OTHER",
        engine="",
    )
    assert borrowed_underscores(wrong) == {"pyrosc.engine.rng._OWN"}
    public = {("pyrosc.engine.trace", "x")}
    assert loose_names(wrong, public) == {"pyrosc.engine.rng.SEED", "pyrosc.engine.adam.x"}


def test_all_names_exist_and_are_sorted():
    assert pyrosc.__all__ == sorted(pyrosc.__all__, key=lambda n: (n.upper() != n, n[0].islower(), n))
    assert all(hasattr(pyrosc, name) for name in pyrosc.__all__)


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


@each_module
def test_no_pickle_no_global_seed_and_no_bare_print(module):
    used = set(names_and_calls(TREES[module]))
    assert not used & {"pickle", "cloudpickle", "dill", "joblib", "torch.load", "torch.save", "shelve"}
    assert not used & {"eval", "exec", "torch.manual_seed", "pyro.set_rng_seed", "pyro.clear_param_store"}
    if module not in ABOVE:
        assert "print" not in used


@each_module
def test_no_path_of_a_machine(module):
    assert not re.search(r"[\"'](/home|/work|/Users|/root|C:\\\\)", SOURCES[module].read_text())


# --- tests mirror the rooms


def test_tests_lie_in_the_folder_of_their_room():
    here = Path(__file__).parent
    folders = {path.relative_to(here).parts[0] for path in here.glob("*/**/test_*.py")}
    assert folders <= {*ROOMS}
    names = [path.name for path in here.rglob("test_*.py")]
    assert len(names) == len(set(names))
