"""The expert graph of the 19 variables as data: checked, replaceable, plotted.

{variable: [its parents]}. The paper (arXiv 2606.19460) draws 29 arrows between 16 variables; dataset and view have
none. No Finding is this project's addition: it follows from the findings by a rule and has no mechanism (see
determined).
"""
import graphlib
import itertools
from statistics import mean

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from common.cli import InputError, count, read_json, whole_file
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
            raise InputError(f"no_finding follows from the findings, and {name} is none; accepted: "
                             f"{', '.join(FINDINGS)}")
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
        return check_graph(read_json(path))
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def kind(graph, name):
    """What a variable is: determined, mechanism (it has parents), root (it only has children) or exogenous."""
    if name == DETERMINED:
        return "determined"
    if graph[name]:
        return "mechanism"
    is_parent = any(name in graph[child] for child in graph if child != DETERMINED)
    return "root" if is_parent else "exogenous"


def print_graph(graph):
    arrows = sum(len(parents) for child, parents in graph.items() if child != DETERMINED)
    print(f"{count(len(graph), 'variable')}, {count(arrows, 'arrow')}")
    for name, parents in check_graph(graph).items():
        print(f"{name:28}{kind(graph, name):12}{'<- ' + ', '.join(parents) if parents else ''}")


# ---------------------------------------------------------------------------------------------------------
# Drawing. Lengths are in inches.

BENDS = (0, 0.12, -0.12, 0.24, -0.24, 0.36, -0.36, 0.5, -0.5, 0.7, -0.7)  # of an arrow, as a share of its length
BOX_HEIGHT, ROW_HEIGHT, COLUMN_WIDTH = 0.36, 1.25, 2.3


def place_variables(graph, stagger):
    """{variable: (x, y, width)}: the middle of its box, and how wide it is. One row for each generation, parents above;
    the variables without arrows (exogenous and determined) stand in the lowest row. Odd rows are moved to the left and
    even rows to the right by the share `stagger` of a column, so that arrows find a way between the boxes."""
    depth = {}
    for name, parents in check_graph(graph).items():
        depth[name] = 1 + max((depth[parent] for parent in parents), default=-1)
    apart = [name for name in graph if kind(graph, name) in ("exogenous", "determined")]
    rows = [[name for name in graph if depth[name] == level and name not in apart] for level in range(len(graph))]
    rows = [row for row in rows if row] or [[]]
    places, columns = {}, max(len(row) for row in [*rows[:-1], rows[-1] + apart])
    for i, row in enumerate(rows):
        def wanted(name):                                            # under its parents, so that arrows are short
            return mean([places[parent][0] for parent in graph[name]] or [0])
        row = sorted(row, key=wanted) + (apart if row is rows[-1] else [])
        for j, name in enumerate(row):
            x = (j + 0.5 + stagger * (-1) ** i) * columns * COLUMN_WIDTH / len(row)
            places[name] = wanted(name) if len(row) == 1 and i else x, -i * ROW_HEIGHT, 0.3 + 0.09 * len(name)
    return places


def bend_arrow(places, parent, child):
    """An arrow as a quadratic Bezier curve from the lower edge of the parent's box to the upper edge of the child's:
    start, control point, end, and how many other boxes it runs through. Of BENDS it takes the first with the fewest."""
    start = np.array(places[parent][:2]) - (0, BOX_HEIGHT / 2)
    end = np.array(places[child][:2]) + (0, BOX_HEIGHT / 2)
    across = np.array([end[1] - start[1], start[0] - end[0]])        # as long as the arrow, at a right angle to it
    others = np.array([places[name] for name in places if name not in (parent, child)]).reshape(-1, 3)
    t, best = np.linspace(0, 1, 50)[:, None], None
    for bend in BENDS:
        control = (start + end) / 2 + bend * across
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t ** 2 * end          # 50 points, x and y
        beside = np.abs(curve[:, None, 0] - others[:, 0]) < others[:, 2] / 2 + 0.08      # 50 points, boxes
        level = np.abs(curve[:, None, 1] - others[:, 1]) < BOX_HEIGHT / 2 + 0.08
        hits = int((beside & level).any(0).sum())
        if best is None or hits < best[3]:
            best = start, control, end, hits
    return best


def arrange(graph):
    """The places of the variables and {(parent, child): (start, control point, end)}, from the stagger with the fewest
    arrows that run through a box. No Finding has no arrows here: all findings lead to it."""
    arrows = [(parent, child) for child in graph if child != DETERMINED for parent in graph[child]]
    fewest = None
    for stagger in (0.12, 0, 0.06, 0.18, 0.24, -0.06, -0.12, -0.18, -0.24):
        places = place_variables(graph, stagger)
        curves = {arrow: bend_arrow(places, *arrow) for arrow in arrows}
        hits = sum(curve[3] for curve in curves.values())
        if fewest is None or hits < fewest:
            fewest, best = hits, (places, {arrow: curve[:3] for arrow, curve in curves.items()})
    return best


def draw_graph(graph, path):
    """The graph as a PNG: an arrow has the colour of its parent's box; dashed boxes have no arrows."""
    places, curves = arrange(graph)
    left = min(x - width / 2 for x, _, width in places.values()) - 0.3
    right = max(x + width / 2 for x, _, width in places.values()) + 0.3
    low = min(y for _, y, _ in places.values()) - 0.5
    figure = Figure(figsize=(right - left, 1 - low))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(low, 1))
    axes.axis("off")
    title = f"Causal graph: {count(len(graph), 'variable')}, {count(len(curves), 'arrow')}"
    axes.text((left + right) / 2, 0.6, title, ha="center", fontsize=15)
    parents = [name for name in graph if any(name == parent for parent, _ in curves)]
    colors = {name: matplotlib.colormaps["tab20"](i % 20) for i, name in enumerate(parents)}
    for name, (x, y, _) in places.items():
        alone = kind(graph, name) in ("exogenous", "determined")
        text = name.replace("_", " ") + (f"\n({kind(graph, name)})" if alone else "")
        line = "--" if alone else "-"
        box = {"boxstyle": "round", "fc": "white", "lw": 2, "ec": colors.get(name, "grey"), "ls": line}
        axes.text(x, y, text, ha="center", va="center", fontsize=11, bbox=box, zorder=3)
    for (parent, _), curve in curves.items():
        path_codes = [Path.MOVETO, Path.CURVE3, Path.CURVE3]
        axes.add_patch(FancyArrowPatch(path=Path(curve, path_codes), arrowstyle="-|>", mutation_scale=14, lw=1.5,
                                       color=colors[parent]))
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def determined(graph, record):
    """{"no_finding": value} as the findings of the record have it: negative if one is positive, positive if all of its
    parents are negative, else {}."""
    said = [record.get(name) for name in graph.get(DETERMINED, ())]
    if "positive" in said:
        return {DETERMINED: "negative"}
    return {DETERMINED: "positive"} if said and set(said) == {"negative"} else {}
