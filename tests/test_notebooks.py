"""Hygiene of the committed notebooks, and proof that each rule catches what it forbids.

nbval passes a cell without any comparison when its execution count is null: a stripped notebook is all
green. So a lesson is committed executed, by `make notebooks`, and this file says what that means.
"""

import ast
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode, v4

from kamal_lib.report import machine_paths

ROOT = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(ROOT.rglob("[!.]*.ipynb"))
MOST_LINES, MOST_BYTES = 30, 300 * 1024


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in code(notebook) if tag in cell.metadata.get("tags", [])]


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_literal_assignment(line: str) -> bool:
    try:
        (node,) = ast.parse(line).body
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            return False
        ast.literal_eval(node.value or "not a literal")
    except (SyntaxError, ValueError):
        return False
    return True


def faults(notebook: NotebookNode) -> list[str]:
    """What is wrong with a notebook; empty when nothing is."""
    cells, found = code(notebook), []
    parameters = tagged(notebook, "parameters")
    lines = [line for cell in parameters for line in cell.source.splitlines() if line.split("#")[0].strip()]
    if len(parameters) != 1 or not lines or not all(map(is_literal_assignment, lines)):
        found.append("one cell `parameters`, one literal a line")
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("execution counts run 1..n")
    if any(output.output_type == "error" for cell in cells for output in cell.outputs):
        found.append("no output is an error")
    if any(not cell.outputs for cell in tagged(notebook, "nbval-check-output")):
        found.append("a checked cell has an output")
    if any(len(cell.source.splitlines()) > MOST_LINES for cell in cells):
        found.append(f"at most {MOST_LINES} lines in a cell")
    pictures = [c for c in cells if any(k.startswith("image/") for o in c.outputs for k in o.get("data", {}))]
    if any(len(cell.metadata.get("alt", "")) < 10 for cell in pictures):
        found.append("a cell with a picture has its alt text in the metadata `alt`")
    if machine_paths(notebook):
        found.append("no path of a machine")
    if "widgets" in notebook.metadata or any("papermill" in cell.metadata for cell in cells):
        found.append("normalised by `make notebooks`")
    if len(nbformat.writes(notebook).encode()) > MOST_BYTES:
        found.append("at most 300 KiB")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert faults(notebook) == []
    assert notebook.metadata.kernelspec.name == "python3"


def clean() -> NotebookNode:
    stream = v4.new_output("stream", text="4\n")
    picture = v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    cells = [
        v4.new_code_cell(
            "# all\nseed: int = 0  # of what\nroot: str | None = None", metadata={"tags": ["parameters"]}
        ),
        v4.new_code_cell("print(4)", metadata={"tags": ["nbval-check-output"]}, outputs=[stream]),
        v4.new_code_cell("figure", metadata={"alt": "A line that rises"}, outputs=[picture]),
    ]
    for count, cell in enumerate(cells, 1):
        cell.execution_count = count
    return v4.new_notebook(cells=cells)


def test_clean_notebook_has_no_fault():
    assert faults(clean()) == []


def plant_stripped(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        cell.execution_count, cell.outputs = None, []


def plant_error(notebook: NotebookNode) -> None:
    notebook.cells[1].outputs.append(v4.new_output("error", ename="E", evalue="", traceback=[]))


def plant_path(notebook: NotebookNode) -> None:
    notebook.cells[1].outputs[0].text = "wrote /home/someone/x.png\n"


PLANTED: list[tuple[str, Callable[[NotebookNode], object]]] = [
    ("one cell `parameters`", lambda n: n.cells[0].metadata.update(tags=[])),
    ("one cell `parameters`", lambda n: n.cells[2].metadata.update(tags=["parameters"])),
    ("one cell `parameters`", lambda n: n.cells[0].update(source="seed = 1 + int('2')")),
    ("one cell `parameters`", lambda n: n.cells[0].update(source="widths = (\n    1,\n)")),
    ("one cell `parameters`", lambda n: n.cells[0].update(source="import os")),
    ("execution counts", plant_stripped),
    ("execution counts", lambda n: n.cells.reverse()),
    ("an error", plant_error),
    ("a checked cell", plant_stripped),
    ("lines in a cell", lambda n: n.cells[2].update(source="x\n" * 31)),
    ("alt text", lambda n: n.cells[2].metadata.clear()),
    ("path of a machine", plant_path),
    ("normalised", lambda n: n.metadata.update(widgets={})),
    ("300 KiB", lambda n: n.cells[2].outputs[0].data.update({"image/png": "A" * MOST_BYTES})),
]


@pytest.mark.parametrize(
    ("rule", "plant"), PLANTED, ids=[f"{n}-{rule}" for n, (rule, _) in enumerate(PLANTED)]
)
def test_planted_fault_is_found(rule: str, plant: Callable[[NotebookNode], object]):
    notebook = clean()
    plant(notebook)
    assert any(rule in fault for fault in faults(notebook))
