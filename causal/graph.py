"""The expert graph of the 19 variables as data: checked, replaceable, drawn.

{variable: [its parents]}; the paper (arXiv 2606.19460) draws 29 arrows between 16 variables. Dataset and View have none.
No Finding is this project's addition: it follows from the findings by a rule and has no mechanism (see determined).
"""
import graphlib
import itertools
import json
import os

from matplotlib.figure import Figure

from common.cli import InputError
from radiographs import fields

DETERMINED = "no_finding"
FINDINGS = [name for name in fields.FINDINGS if name not in ("no_finding", "support_devices")]  # devices are no finding

# The paper's 29 arrows, child: parents. Dataset and view have none; No Finding is this project's addition.
GRAPH = {"dataset": [], "view": [], "age": [], "sex": [], "race": [],
         "cardiomegaly": ["age", "sex", "race"], "edema": ["age", "sex", "race"], "pleural_other": ["age", "sex"],
         "pneumonia": ["age", "sex"], "fracture": ["age", "sex"], "pneumothorax": ["age", "sex", "fracture"],
         "enlarged_cardiomediastinum": ["cardiomegaly"], "consolidation": ["pneumonia"],
         "pleural_effusion": ["cardiomegaly", "pleural_other", "pneumonia"],
         "support_devices": ["pneumothorax", "pleural_effusion"], "atelectasis": ["pneumothorax", "pleural_effusion"],
         "lung_opacity": ["edema", "pleural_other", "consolidation", "atelectasis"], "lung_lesion": ["lung_opacity"],
         "no_finding": FINDINGS}


def check_graph(graph):
    """The graph {variable: [parents]}, parents before children. Raises InputError: form, unknown variable, cycle."""
    if not isinstance(graph, dict) or not all(isinstance(parents, (list, tuple)) for parents in graph.values()):
        raise InputError('a graph is a JSON object of variable: [its parents], such as {"age": [], "edema": ["age"]}')
    for name in itertools.chain(graph, *graph.values()):
        if name not in fields.FIELDS:
            raise InputError(f"unknown variable {name!r} in the graph; the variables are {', '.join(fields.FIELDS)}")
        if name not in graph:
            raise InputError(f"{name} is a parent in the graph, but not a variable of its own: add {name}: []")
    for name in graph.get(DETERMINED, ()):
        if name not in FINDINGS:
            raise InputError(f"no_finding follows from the findings, and {name} is none; accepted: {', '.join(FINDINGS)}")
    for child, parents in graph.items():
        if DETERMINED in parents:
            raise InputError(f"no_finding follows from the findings and causes nothing: take the arrow to {child} away")
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise InputError(f"the graph has a cycle: {' -> '.join(error.args[1])}") from None
    return {name: list(graph[name]) for name in order}


def read_graph(path):
    try:
        return check_graph(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def kind(graph, name):
    """What a variable is in the graph, in one word."""
    arrows = [(parent, child) for child in graph if child != DETERMINED for parent in graph[child]]
    if name == DETERMINED:
        return "determined"
    return "mechanism" if graph[name] else "root" if any(name == parent for parent, _ in arrows) else "exogenous"


def print_graph(graph):
    arrows = sum(len(parents) for child, parents in graph.items() if child != DETERMINED)
    print(f"{len(graph)} variables, {arrows} arrows")
    for name, parents in check_graph(graph).items():
        print(f"{name:28}{kind(graph, name):12}{'<- ' + ', '.join(parents) if parents else ''}")


def draw_graph(graph, path):
    """One row a generation: every variable stands below its parents, and its arrows have its colour. Dashed: exogenous,
    or determined."""
    depth = {}
    for name, parents in check_graph(graph).items():
        depth[name] = 1 + max((depth[parent] for parent in parents), default=-1)
    place, figure = {}, Figure(figsize=(13, 9), layout="constrained")
    axes, color = figure.subplots(), {name: f"C{i}" for i, name in enumerate(graph)}
    for level in range(max(depth.values()) + 1):
        row = [name for name in graph if depth[name] == level]
        place |= {name: ((i + 0.5 + 0.15 * (-1) ** level) / len(row), -level) for i, name in enumerate(row)}
    for name, (x, y) in place.items():
        dashed = kind(graph, name) in ("exogenous", "determined")
        text = name.replace("_", " ") + (f"\n({kind(graph, name)})" if dashed else "")
        axes.text(x, y, text, ha="center", va="center", zorder=3, fontsize=11,
                  bbox={"boxstyle": "round", "fc": "white", "ec": color[name], "lw": 2, "ls": "--" if dashed else "-"})
        for parent in graph[name] if name != DETERMINED else ():      # its arrows would hide all others
            arrow = {"arrowstyle": "-|>", "color": color[parent], "lw": 1.5}
            axes.annotate("", (x, y + 0.13), place[parent], arrowprops=arrow, zorder=1)
    axes.set(xlim=(-0.05, 1.05), ylim=(-max(depth.values()) - 0.4, 0.4))
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.tmp", format="png", dpi=80)
    os.replace(f"{path}.tmp", path)


def determined(graph, record):
    """{"no_finding": value} as the findings of the record have it: negative if one is positive, positive if all of its
    parents are negative, else {}."""
    said = [record.get(name) for name in graph.get(DETERMINED, ())]
    if "positive" in said:
        return {DETERMINED: "negative"}
    return {DETERMINED: "positive"} if said and set(said) == {"negative"} else {}
