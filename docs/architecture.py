"""Draw the rooms of pyrosc and which imports which, from the imports as they are: docs/architecture.svg.

An import that others imply is left out: a room that imports models may import all that models do.
"""

import ast
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "pyrosc"
ENGINE, PYRO, COUNTS, AROUND = "#F3C779", "#A9D6F0", "#8FD0B9", "#DDDDDD"
ROOMS = {
    "engine": (ENGINE, "steps verified and replayed; loops over counts"),
    "data": (PYRO, "AnnData to Counts to Cells, a minibatch"),
    "datasets": (PYRO, "simulated counts, 700 real cells"),
    "distributions": (PYRO, "Poisson, negative binomial, zero inflation"),
    "nn": (PYRO, "parts of programs: encoders, decoders, priors"),
    "models": (PYRO, "one generative story a file"),
    "inference": (PYRO, "fit_svi and Fit: any program"),
    "posterior": (PYRO, "questions put to a Fit"),
    "reference_mapping": (PYRO, "fit_query: new batches"),
    "differential": (COUNTS, "counts and a design in, a table out"),
    "criticism": (AROUND, "is the fit any good"),
    "plots": (AROUND, "pictures"),
    "cli": (AROUND, "the command pyrosc"),
}


def imports() -> set[tuple[str, str]]:
    """Return which room imports which."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyrosc"):
                names = [node.module.split(".")[1]] if "." in node.module else [a.name for a in node.names]
                found |= {(room, name) for name in names if {room, name} <= {*ROOMS} and name != room}
    return found


def implied(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the imports that a chain of others makes too."""

    def reached(room: str, without: tuple[str, str]) -> set[str]:
        after = {b for a, b in edges if a == room and (a, b) != without}
        return after.union(*(reached(b, without) for b in after)) if after else after

    return {(a, b) for a, b in edges if b in reached(a, (a, b))}


def main() -> None:
    """Draw and save."""
    figure = Figure(figsize=(8, 7))
    ax = figure.add_axes((0, 0, 1, 1))
    height = {room: -i for i, room in enumerate(ROOMS)}
    for room, (colour, words) in ROOMS.items():
        box = FancyBboxPatch(
            (0, height[room] - 0.3), 6.8, 0.6, boxstyle="round,pad=0.06", fc=colour, ec="0.35"
        )
        ax.add_patch(box)
        ax.text(0.15, height[room], room, va="center", fontsize=12, fontweight="bold")
        ax.text(2.45, height[room], words, va="center", fontsize=9.5)
    edges = imports()
    for room, target in edges - implied(edges):
        ends = (6.87, height[room] + 0.1), (6.87, height[target] - 0.1)
        bend = 0.25 + 0.5 / (height[target] - height[room])
        arrow = {"arrowstyle": "-|>", "mutation_scale": 11, "color": "0.25", "lw": 1}
        ax.add_patch(FancyArrowPatch(*ends, connectionstyle=f"arc3,rad={bend}", **arrow))
    sides = {"engine": ("engine", "engine"), "the Pyro library": ("data", "reference_mapping")}
    sides |= {"count\nstatistics": ("differential", "differential")}
    for name, (first, last) in sides.items():
        middle = (height[first] + height[last]) / 2
        ax.plot([-0.25, -0.25], [height[first] + 0.3, height[last] - 0.3], color="0.35", lw=2)
        ax.text(-0.4, middle, name, rotation=90, ha="right", linespacing=1.0, va="center", fontsize=10)
    ax.set(xlim=(-1.2, 8.8), ylim=(-len(ROOMS) + 0.4, 0.6))
    ax.axis("off")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pyrosc"}):
        figure.savefig(HERE / "architecture.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
