"""The notebooks: their saved outputs, what they import, and (slow) each run from a clean kernel, in minutes altogether.

Without a trained checkpoint at hand the slow tests train a small one first, which takes some minutes more.
"""

from __future__ import annotations

import ast
import importlib
import pathlib
import re

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

import nbformat
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from notebooks import run

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = run.paths()
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@each
def test_saved_outputs(path):
    """They come from a whole run of the code that stands there, and hold pictures but nothing of the machine."""
    notebook = run.read(path)
    nbformat.validate(notebook)
    assert not run.faults(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert path.stat().st_size < 1 << 20


@each
def test_it_imports_what_is_there(path):
    """Names of this project that a cell imports exist, so that moving one is noticed before the slow tests."""
    plain = [re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE) for source in code_of(run.read(path))[1:]]
    found = 0
    for node in ast.walk(ast.parse("\n".join(plain))):
        if isinstance(node, ast.ImportFrom) and (ROOT / node.module.split(".")[0]).is_dir():
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
                found += 1
    assert found > 2


def test_all_begin_alike():
    """The cell that installs is the same everywhere, and every notebook is listed in the README beside them."""
    setups = {code_of(run.read(path))[0] for path in NOTEBOOKS}
    assert len(setups) == 1
    readme = (run.FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in readme for path in NOTEBOOKS)
    assert len(NOTEBOOKS) >= 2


@each
def test_links_lead_somewhere(path):
    for cell in run.read(path).cells:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", cell.source if cell.cell_type == "markdown" else ""):
            assert (run.FOLDER / target).exists(), target


# ---------------------------------------------------------------- the tool


def notebook_of(*sources: str) -> nbformat.NotebookNode:
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    return notebook


def test_running_one():
    """Parameters, the folder it runs in, progress bars, folders of the machine, and what is said of stale outputs."""
    notebook = notebook_of(
        "WORD = None  # a word\nCOUNT = 2",
        "import os, sys\nprint(WORD * COUNT, os.getcwd())",
        "for i in range(3):\n    print(f'\\r{i * 50}%|##| {i}/2 [00:01, 3.1it/s]', end='', file=sys.stderr)",
        "'\\x1b[31mred\\x1b[0m'; print('\\x1b[31mred\\x1b[0m')",
    )
    run.tidy(run.execute(notebook, {"WORD": "ab"}))
    assert notebook.cells[0].source == "WORD = None  # a word\nCOUNT = 2"
    assert notebook.cells[1].outputs[0].text == f"abab {run.FOLDER}\n".replace(f"{ROOT}/", "")
    assert not notebook.cells[2].outputs
    assert notebook.cells[3].outputs[0].text == "red\n"
    assert not run.faults(notebook)
    notebook.cells[1].source = "import os, sys\n\nprint(WORD * COUNT, os.getcwd())  # formatted"
    assert not run.faults(notebook)
    notebook.cells[1].source += "\nprint(3)"
    assert run.faults(notebook) == ["its outputs are those of other code"]


def test_what_a_busy_machine_says_is_left_out():
    alarm = (
        "E1126 05:59:16.290049   28884 slow_operation_alarm.cc:73] \n****\n[Compiling module jit_f] Very slow?\n****\n"
    )
    took = "E1126 06:00:09.900992   28661 slow_operation_alarm.cc:140] It took 2m\n\n****\n[Compiling f]\n****\n"
    notebook = notebook_of("1")
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text=alarm + took)]
    assert not run.tidy(notebook).cells[0].outputs
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text=alarm + "ours\n")]
    assert run.tidy(notebook).cells[0].outputs[0].text == "ours\n"


def test_failing_ones(tmp_path, monkeypatch, capsys):
    """Nothing is saved of a cell that fails; a name or a parameter that does not exist is named."""
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    path = tmp_path / "01_bad.ipynb"
    cells = ("WORD = 1", "print('/home/somebody')", "import warnings; warnings.warn('old')", "1 / 0")
    nbformat.write(notebook_of(*cells), path)
    before = path.read_bytes()
    assert run.main(["01"]) == 1 and "ZeroDivisionError" in capsys.readouterr().err
    assert run.main(["02"]) == 2 and "no notebook begins with '02'" in capsys.readouterr().err
    assert run.main(["01", "--set", "WORDS=2"]) == 1 and "sets WORDS" in capsys.readouterr().err
    assert path.read_bytes() == before
    failed = run.read(path)
    with pytest.raises(CellExecutionError):
        run.execute(failed)
    found = "\n".join(run.faults(failed))
    assert "cell 1 shows a folder" in found and "cell 2 writes on standard error" in found and "cell 3 ends" in found


# ---------------------------------------------------------------- whole runs


@pytest.mark.slow
@each
def test_whole_run(path):
    """In order: the first one trains the small checkpoint if there is none, and the others use it."""
    notebook = run.tidy(run.execute(run.read(path), timeout=3000, JAX_DISABLE_MOST_OPTIMIZATIONS="0"))
    assert not run.faults(notebook)
