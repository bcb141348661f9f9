"""Run notebooks and leave a report: executed notebooks, HTML pages, `results.json` and `index.html`.

    python -m kamal_lib.report                                        every lesson
    python -m kamal_lib.report 00 03 --profile quick --seed 1         two of them
    python -m kamal_lib.report --study ka --profile gpu -p teachers=3
    python -m kamal_lib.report --in-place                             renew the lessons' committed outputs

What a notebook does to appear on the index page:
- a cell tagged `results` displays a JSON object of tables by title, `IPython.display.JSON({title: table})`,
  where a table is `{row: {column: value}}` or `{row: value}`; `results.json` holds the same objects;
- the PNG outputs of a cell tagged `figure-index` are shown, with the cell's metadata `alt` as alt text.

The pages need no network, but for equations: MathJax comes from its public address, and without it they are
shown as TeX source. Widgets are left out: each has a static figure beside it.
"""

import argparse
import ast
import difflib
import html
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import torch
from filelock import FileLock, Timeout
from jinja2 import Template
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from kamal_lib.recipes import PROFILES
from kamal_lib.recipes.data import DATA

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kamal-workbook", "torch", "torchvision", "lightning-fabric", "numpy", "papermill")
WIDGET = "application/vnd.jupyter.widget-view+json"
HIDDEN = {WIDGET, "application/json"}
FOR_KERNELS = {
    "GOMP_SPINCOUNT": "1000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TOP_PAD_": "67108864",
}
"""Threads that fall asleep, and memory that is kept: the Makefile says why."""
INDEX = Path(__file__).with_suffix(".html.j2")


def choose(folder: Path, names: Sequence[str] = (), study: str | None = None) -> list[Path]:
    """The lessons of these numbers or names (none: all of them), or the one study.

    Raises ValueError for a name that is not there, FileNotFoundError for a folder without notebooks.
    """
    pattern = "studies/*.ipynb" if study else "[0-9][0-9]_*.ipynb"
    known = {path.stem: path for path in sorted(folder.glob(pattern))}
    if not known:
        raise FileNotFoundError(
            f"no notebook {pattern} in {folder}: none yet, or no checkout of the workbook"
        )
    chosen = []
    for name in [study] if study else names or known:
        found = [path for stem, path in known.items() if name in ((stem,) if study else (stem, stem[:2]))]
        if not found:
            raise ValueError(f"no notebook {name!r}{_closest(name, known)}; there are: {', '.join(known)}")
        chosen += found
    return chosen


def parameters(notebook: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook's `parameters` cell declares, with the given values in place of its own.

    Raises ValueError for a name that is not declared (papermill alone would inject it with a mere warning,
    and the misspelt option would change nothing) and for a declared value that is not a literal.
    """
    cells = _code(nbformat.read(notebook, as_version=4), "parameters")
    source = "\n".join(cell.source for cell in cells)
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    names = [ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) for node in nodes]
    declared = {name: ast.literal_eval(node.value or "None") for name, node in zip(names, nodes, strict=True)}
    for name in given:
        if name not in declared:
            there = ", ".join(declared) or "none"
            problem = f"{notebook.name} has no parameter {name!r}{_closest(name, declared)}"
            raise ValueError(f"{problem}; there are: {there}")
    return declared | dict(given)


def run(notebook: Path, out: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Execute a notebook in its own folder into `out`; returns its entry in `results.json` and its figures.

    A notebook that fails does not raise: what it did is written all the same, and `error` names the cell.
    """
    target, start, why = out / notebook.name, time.perf_counter(), None
    print(f"{notebook.stem}: started", flush=True)
    bar: Any = {"desc": notebook.stem, "leave": False, "disable": None}  # None: only on a terminal
    options: dict[str, Any] = {"cwd": notebook.parent, "kernel_name": "python3", "progress_bar": bar}
    options["extra_arguments"] = ["--log-level=ERROR"]  # ipykernel warns of its own transport, every time
    try:
        executed = papermill.execute_notebook(notebook, target, dict(given), **options)
    except (PapermillExecutionError, RuntimeError) as failure:  # RuntimeError: the kernel died
        raised = isinstance(failure, PapermillExecutionError)
        why = f"{failure.ename}: {failure.evalue}" if raised else f"{failure} (killed, or out of memory?)"
        executed = nbformat.read(target, as_version=4)
    seconds = round(time.perf_counter() - start, 1)
    print(f"{notebook.stem}: {'FAILED' if why else 'done'} after {seconds} s", flush=True)
    target.with_suffix(".html").write_text(page(executed, notebook.parent), encoding="utf-8")
    took = {_label(cell): cell.metadata.get("papermill", {}).get("duration") for cell in _code(executed)}
    ran = {label: round(duration, 1) for label, duration in took.items() if duration is not None}
    results = _tagged(executed, "results", "application/json")
    entry = {
        "error": f"cell {next(reversed(ran), None)}: {why}" if why else None,
        "seconds": seconds,
        "slowest_cells": dict(sorted(ran.items(), key=lambda item: -item[1])[:3]),
        "parameters": _resolved(parameters(notebook, given)),
        "results": dict(item for tables, _ in results for item in tables.items()),
    }
    return entry, [_image(png, alt) for png, alt in _tagged(executed, "figure-index", "image/png")]


def page(executed: NotebookNode, folder: Path) -> str:
    """A notebook (of this folder) as one HTML page: figures embedded, with alt text; no widgets."""
    shown = deepcopy(executed)
    shown.metadata.pop("widgets", None)
    for cell in _code(shown):
        cell.outputs = [each for each in cell.outputs if not HIDDEN & each.get("data", {}).keys()]
        for data in (each.data for each in cell.outputs if "image/png" in each.get("data", {})):
            data["text/html"] = _image(data["image/png"], cell.metadata.get("alt", ""))
    exporter = HTMLExporter(embed_images=True, require_js_url="", jquery_url="")
    return exporter.from_notebook_node(shown, {"metadata": {"path": str(folder)}})[0]


def environment() -> dict[str, Any]:
    """Versions, hardware and git revision; what cannot be found out is None."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    try:
        revision = _git("rev-parse", "HEAD")
        # new files count as changes too, unlike in `git describe --dirty`
        revision += (
            "-dirty"
            if _git("status", "--porcelain", "--", "kamal_lib", ":(glob)notebooks/**/*.ipynb")
            else ""
        )
    except (OSError, subprocess.CalledProcessError):
        revision = None
    return {
        "revision": revision,
        "KAMAL_PROFILE": os.environ.get("KAMAL_PROFILE"),
        "processor": f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.platform()}, Python {platform.python_version()}",
    } | {name: importlib.metadata.version(name) for name in PACKAGES}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def normalised(executed: NotebookNode) -> NotebookNode:
    """The notebook as it is committed: outputs and counts kept; times, machine and widgets dropped.

    Raises ValueError where it holds a path of this machine.
    """
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = deepcopy(executed)
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    for cell in notebook.cells:
        for key in ("papermill", "execution", *([] if cell.metadata.get("tags") else ["tags"])):
            cell.metadata.pop(key, None)
    for cell in _code(notebook):
        cell.outputs = [each for each in cell.outputs if WIDGET not in each.get("data", {})]
    if paths := machine_paths(notebook):
        raise ValueError(f"paths of this machine would be committed: {', '.join(paths)}")
    return notebook


def machine_paths(notebook: NotebookNode) -> list[str]:
    """The absolute paths in a notebook's sources and text outputs."""
    text = re.sub(r'"image/[^"]*": "[^"]*"', "", nbformat.writes(notebook))  # lines apart, pictures left out
    return sorted(set(re.findall(r"(?<![\w.:/<~)\]}])/[\w.-]+/[\w.-]+|\b[A-Z]:\\\\\w+", text)))


def _code(notebook: NotebookNode, tag: str | None = None) -> list[NotebookNode]:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag is None or tag in cell.metadata.get("tags", [])]


def _tagged(notebook: NotebookNode, tag: str, mime: str) -> list[tuple[Any, str]]:
    outputs = [(each, cell.metadata.get("alt", "")) for cell in _code(notebook, tag) for each in cell.outputs]
    return [(each.data[mime], alt) for each, alt in outputs if mime in each.get("data", {})]


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters with the profile that None stands for, so that a smoke run is not read as a result."""
    chosen = os.environ.get("KAMAL_PROFILE") or "quick"
    return values | {"profile": chosen} if values.get("profile", "") is None else values


def _closest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        return list(value) if isinstance(value, tuple) else value  # papermill would make a tuple a string
    except (ValueError, SyntaxError):
        return text  # -p profile=quick needs no quotes


def _label(cell: NotebookNode) -> str:
    return f"[{cell.execution_count or '*'}] {cell.source.strip().split(chr(10))[0][:70]}"


def _image(png: str, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{"".join(png.split())}">'


def main(arguments: Sequence[str] | None = None, *, folder: Path = ROOT / "notebooks") -> int:
    """Run from the command line; returns the exit status: 1 where a notebook failed or was refused."""
    parser = argparse.ArgumentParser(prog="python -m kamal_lib.report", description="Run lessons or a study.")
    add = parser.add_argument
    add("lessons", nargs="*", help="numbers or names of lessons (default: all)")
    add("--study", metavar="NAME", help="run this study instead of the lessons")
    add("--data", choices=list(DATA))
    add("--data-root", metavar="PATH", type=lambda path: str(Path(path).expanduser().resolve()))
    add("--profile", choices=list(PROFILES))
    add("--seed", type=int)
    add("-p", action="append", default=[], metavar="NAME=VALUE", help="any other parameter")
    add("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")
    add("--in-place", action="store_true", help="at the quick profile, and renew the notebooks themselves")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("data", "data_root", "profile", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if wrong := [each for each in options.p if "=" not in each]:
        parser.error(f"-p wants NAME=VALUE, got {wrong[0]!r}")
    given |= {name: _literal(value) for name, _, value in (each.partition("=") for each in options.p)}
    if options.in_place and given:
        parser.error("--in-place takes no parameters: the committed outputs are those of the notebooks' own")
    if options.data not in (None, "rooms") and options.data_root is None:
        parser.error(f"--data {options.data} needs --data-root PATH (make: DATA_ROOT=PATH)")
    if options.data_root is not None and not Path(options.data_root).exists():
        parser.error(
            f"--data-root {options.data_root} is neither a folder nor a .mat file (make: DATA_ROOT=PATH)"
        )
    if options.study and options.lessons:
        parser.error(f"--study runs a study alone: leave {' '.join(options.lessons)} out, or the study")
    if options.in_place:
        os.environ["KAMAL_PROFILE"] = "quick"
    os.environ["KAMAL_QUIET"] = "1"  # progress bars would be saved frozen at 0 %
    for name, value in FOR_KERNELS.items():
        os.environ.setdefault(name, value)
    # papermill's own inspection overlooks `x: str | None` and would warn of an unknown parameter
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        notebooks = choose(folder, options.lessons, options.study)
        for notebook in notebooks:
            parameters(notebook, given)
        options.out.mkdir(parents=True, exist_ok=True)
        with FileLock(options.out / ".lock", timeout=0):
            failed = _report(notebooks, options.out, given, in_place=options.in_place)
    except Timeout:
        failed = [f"another report is being written to {options.out}: wait for it, or give another --out"]
    except (ValueError, FileNotFoundError) as error:  # which say by themselves what is missing
        failed = [str(error)]
    except OSError as error:
        failed = [f"{error} (the report goes to {options.out}: is there room, and may you write?)"]
    except KeyboardInterrupt:
        print("report: stopped; run it again, and what was trained is not trained again", file=sys.stderr)
        return 130
    for message in failed:
        print(f"report: {message}", file=sys.stderr)
    return int(bool(failed))


def _report(notebooks: Sequence[Path], out: Path, given: Mapping[str, Any], *, in_place: bool) -> list[str]:
    runs, figures = {}, {}
    record = {"environment": environment(), "notebooks": runs}
    for notebook in notebooks:
        name = notebook.stem
        runs[name], figures[name] = run(notebook, out, given)
        (out / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        index = Template(INDEX.read_text(encoding="utf-8"), autoescape=True).render(record, figures=figures)
        (out / "index.html").write_text(index, encoding="utf-8")
        if in_place and not runs[name]["error"]:
            nbformat.write(normalised(nbformat.read(out / notebook.name, as_version=4)), notebook)
    print(f"report: {out / 'index.html'}")
    return [f"{name} failed in {each['error']}" for name, each in runs.items() if each["error"]]


if __name__ == "__main__":
    sys.exit(main())
