"""The report, on tiny notebooks made here: what it injects, collects, refuses and leaves behind."""

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from bs4 import BeautifulSoup
from filelock import FileLock
from jinja2 import Template
from nbformat import v4

from kamal_lib import report

PARAMETERS = "profile: str | None = None  # None: quick\nseed: int = 0\ndata_root: str | None = None"
ALT = 'A line that rises from 1 to 2 < "3"'


def code(source: str, *tags: str, **metadata: Any) -> nbformat.NotebookNode:
    return v4.new_code_cell(source, metadata={"tags": list(tags), **metadata})


def write(path: Path, *cells: nbformat.NotebookNode) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=list(cells), metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three lessons: one that works, one that raises, one whose kernel is killed."""
    folder = tmp_path_factory.mktemp("notebooks")
    write(
        folder / "00_good.ipynb",
        v4.new_markdown_cell("# Title\n$$\\sum_i x_i$$"),
        code(PARAMETERS, "parameters"),
        code("import os\nprint(os.path.basename(os.getcwd()), seed, os.path.isabs(data_root or ''))"),
        code(
            "from IPython.display import JSON\n"
            "JSON({'Accuracy': {'teacher': {'mIoU': 0.123456, 'seed': seed},"
            " 'student': {'mIoU': 0.25, 'seed': seed}}, 'Sizes': {'blocks': 4}, 'Images': 200})",
            "results",
        ),
        code("import ipywidgets\nipywidgets.IntSlider()"),
        code(
            "%matplotlib inline\nfrom matplotlib.figure import Figure\n"
            "figure = Figure(figsize=(1, 1))\nfigure.subplots().plot([1, 2])\nfigure",
            "figure-index",
            alt=ALT,
        ),
    )
    write(
        folder / "01_raises.ipynb",
        code(PARAMETERS, "parameters"),
        code("print('got here')"),
        code("raise FileNotFoundError('no folder rooms: expected image/ and depth/')"),
        code("print('never')"),
    )
    killed = code("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    write(folder / "02_killed.ipynb", code(PARAMETERS, "parameters"), killed)
    return folder


@pytest.fixture(scope="module")
def good(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the notebook that works, with a seed and a relative data root."""
    out = tmp_path_factory.mktemp("report")
    given = ["00", "--seed", "7", "--data-root", os.path.relpath(folder), "--out", str(out)]
    assert report.main(given, folder=folder) == 0
    return out


def entry(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())["notebooks"][name]


def stdout(out: Path, name: str) -> str:
    outputs = [
        each for cell in nbformat.read(out / f"{name}.ipynb", 4).cells for each in cell.get("outputs", [])
    ]
    return "".join(each.text for each in outputs if each.output_type == "stream")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--profile", "fast"], "invalid choice: 'fast'"),
        (["--data", "kitti"], "invalid choice: 'kitti'"),
        (["--data", "nyuv2"], "--data nyuv2 needs --data-root PATH"),
        (["--data-root", "no/such/place"], "is neither a folder nor a .mat file (make: DATA_ROOT=PATH)"),
        (["-p", "seed"], "-p wants NAME=VALUE, got 'seed'"),
        (["00", "--study", "teachers"], "--study runs a study alone: leave 00 out"),
    ],
)
def test_wrong_options_leave_the_last_report_alone(
    given: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "index.html").write_text("the last report")
    with pytest.raises(SystemExit):
        report.main([*given, "--out", str(tmp_path)], folder=folder)
    assert message in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "the last report"


def test_notebook_runs_in_its_own_folder_with_the_given_parameters(folder: Path, good: Path):
    assert stdout(good, "00_good") == f"{folder.name} 7 True\n"
    expected = {"profile": "quick", "seed": 7, "data_root": str(folder.resolve())}
    assert entry(good, "00_good")["parameters"] == expected
    injected = nbformat.read(good / "00_good.ipynb", 4).cells[2]
    assert "injected-parameters" in injected.metadata.tags
    assert "profile" not in injected.source  # only what was given


def test_results_keep_their_order_and_reach_json_and_index(good: Path):
    results = entry(good, "00_good")["results"]
    rows = {"teacher": {"mIoU": 0.123456, "seed": 7}, "student": {"mIoU": 0.25, "seed": 7}}
    assert results == {"Accuracy": rows, "Sizes": {"blocks": 4}, "Images": 200}
    assert list(results["Accuracy"]) == ["teacher", "student"]
    index = "".join((good / "index.html").read_text().split())
    assert "teacher</th><td>0.1235</td><td>7</td>" in index
    assert "Images:200" in index


def test_rows_with_other_columns_keep_all_their_values():
    """Each task of the workbook has metrics of its own."""
    results = {"Scores": {"SegNet": {"miou": 0.5}, "DepthNet": {"abs_rel": 0.125}}}
    runs = {"00": {"error": None, "seconds": 1, "slowest_cells": {}, "parameters": {}, "results": results}}
    page = Template(report.INDEX.read_text(encoding="utf-8"), autoescape=True).render(
        environment={}, notebooks=runs, figures={"00": []}
    )
    cells = [
        cell.get_text() for cell in BeautifulSoup(page, "html.parser").find("table").find_all(["th", "td"])
    ]
    assert cells == ["", "miou", "abs_rel", "SegNet", "0.5", "", "DepthNet", "", "0.125"]


def test_a_tuple_reaches_the_notebook_as_a_list():
    assert report._literal("(1, 2)") == [1, 2]
    assert report._literal("quick") == "quick"


def test_figure_is_embedded_with_its_alt_text(good: Path):
    for page in ("index.html", "00_good.html"):
        images = BeautifulSoup((good / page).read_text(), "html.parser").find_all("img")
        assert [image["alt"] for image in images] == [ALT]
        assert images[0]["src"].startswith("data:image/png;base64,iVBOR")


def test_pages_work_offline_but_for_mathjax(good: Path):
    text = (good / "00_good.html").read_text()
    assert "require.min.js" not in text
    assert "widget-view" not in text
    assert "\\sum_i x_i" in text  # the equation's source is there to be read
    assert "http" not in (good / "index.html").read_text()


def test_runtimes_versions_and_hardware_are_recorded(good: Path):
    record = json.loads((good / "results.json").read_text())
    assert record["environment"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["environment"]["processor"].endswith(f"{os.cpu_count()} cores")
    slowest = record["notebooks"]["00_good"]["slowest_cells"]
    assert len(slowest) == 3
    assert list(slowest.values()) == sorted(slowest.values(), reverse=True)
    assert record["notebooks"]["00_good"]["seconds"] >= sum(slowest.values())


def test_failures_are_named_and_what_ran_is_kept(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert report.main(["01", "02", "--out", str(tmp_path)], folder=folder) == 1
    errors = capfd.readouterr().err
    raised = "FileNotFoundError: no folder rooms: expected image/ and depth/"
    assert "01_raises failed in cell [3] raise FileNotFoundError('no folder rooms" in errors
    assert entry(tmp_path, "01_raises")["error"].endswith(raised)
    assert stdout(tmp_path, "01_raises") == "got here\n"
    assert "got here" in (tmp_path / "01_raises.html").read_text()
    assert re.search(r"02_killed failed in cell \[[2*]\] import os, signal: Kernel died", errors)
    assert raised in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["00", "-p", "sed=3"], "00_good.ipynb has no parameter 'sed' (did you mean 'seed'?)"),
        (
            ["00", "--data", "rooms"],
            "has no parameter 'data' (did you mean 'data_root'?); there are: profile, seed",
        ),
        (["00_goood"], "no notebook '00_goood' (did you mean '00_good'?); there are: 00_good, 01_raises"),
        (["--study", "ka"], "no notebook studies/*.ipynb"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert report.main([*arguments, "--out", str(tmp_path / "out")], folder=folder) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_study_is_found_by_name(folder: Path, tmp_path: Path):
    study = write(tmp_path / "studies" / "ka.ipynb", code("steps = 3", "parameters"))
    write(tmp_path / "studies" / "ka_options.ipynb", code("steps = 3", "parameters"))
    assert report.choose(tmp_path, study="ka") == [study]
    with pytest.raises(ValueError, match="no notebook 'ka_option'"):
        report.choose(tmp_path, study="ka_option")
    assert report.parameters(study, {"steps": 5}) == {"steps": 5}


def test_values_that_are_no_literals_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="malformed node"):
        report.parameters(write(tmp_path / "00_x.ipynb", code("steps = 2 * width", "parameters")), {})


def test_second_report_into_the_same_folder_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with FileLock(tmp_path / ".lock"):
        assert report.main(["00", "--out", str(tmp_path)], folder=folder) == 1
    assert f"another report is being written to {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "00_good.ipynb").exists()


def test_unwritable_folder_is_one_message(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert report.main(["00", "--out", str(tmp_path / "file" / "out")], folder=folder) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_in_place_renews_outputs_and_nothing_else(tmp_path: Path):
    check = code("import os\nprint(os.environ['KAMAL_PROFILE'])", "nbval-check-output")
    lesson = write(
        tmp_path / "00_x.ipynb",
        code(PARAMETERS, "parameters"),
        check,
        code("import ipywidgets\nipywidgets.IntSlider()"),
    )
    sources = [cell.source for cell in nbformat.read(lesson, 4).cells]
    assert report.main(["--in-place", "--out", str(tmp_path / "out")], folder=tmp_path) == 0
    first = lesson.read_bytes()
    notebook = nbformat.read(lesson, 4)
    assert [cell.source for cell in notebook.cells] == sources
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3]
    assert notebook.cells[1].outputs[0].text == "quick\n"
    assert notebook.cells[2].outputs == []
    assert [dict(cell.metadata) for cell in notebook.cells] == [
        {"tags": ["parameters"]},
        {"tags": ["nbval-check-output"]},
        {},
    ]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert report.main(["--in-place", "--out", str(tmp_path / "out")], folder=tmp_path) == 0
    assert lesson.read_bytes() == first


@pytest.mark.parametrize("arguments", [["--seed", "1"], ["-p", "x=1"]])
def test_in_place_takes_no_parameters(folder: Path, arguments: list[str]):
    with pytest.raises(SystemExit, match="2"):
        report.main(["--in-place", *arguments], folder=folder)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("saved to /home/someone/data/x.png", ["/home/someone"]),
        ("File '/usr/lib/python3.11/x.py'", ["/usr/lib"]),
        (r"C:\Users\someone", [r"C:\\Users"]),
        ("https://a.org/b/c, and/or, 3/4/5, data/store/x, <td></td></tr>, //a/b, m/s", []),
    ],
)
def test_machine_paths_are_told_from_other_slashes(text: str, found: list[str]):
    stream = v4.new_output("stream", text=f"first line\n{text}\n")
    picture = v4.new_output("display_data", data={"image/png": "+/abc/def"})
    notebook = v4.new_notebook(cells=[v4.new_code_cell("1 / 2", outputs=[stream, picture])])
    assert report.machine_paths(notebook) == found
    if found:
        with pytest.raises(ValueError, match="paths of this machine would be committed"):
            report.normalised(notebook)
