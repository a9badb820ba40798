"""Runs notebooks from clean kernels and saves their outputs: `python -m notebooks.run [NAME...] [CHECKPOINT=DIR]`.

A notebook starts in its own folder, as Jupyter starts it. Nothing is saved of one that fails.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = pathlib.Path(__file__).resolve().parent
_ROOT = FOLDER.parent
_KEPT = ("kernelspec", "language_info")
# What terminals do with a line: colors, and writing it again, as progress bars do.
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def paths(names: Sequence[str] = ()) -> list[pathlib.Path]:
    """The notebooks in order, or those that begin with one of `names`; ValueError for a name that none begins with."""
    found = sorted(FOLDER.glob("*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in found):
            raise ValueError(f"no notebook begins with {name!r}; there are {', '.join(path.stem for path in found)}")
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def read(path: pathlib.Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(
    notebook: NotebookNode, parameters: Mapping[str, Any] | None = None, timeout: int = 1800, **environment: str
) -> NotebookNode:
    """Runs all cells of `notebook` in a kernel of its own; returns it with its outputs.

    Args:
      parameters: values in place of those of the cell tagged `parameters`.
      timeout: seconds for one cell.
      environment: variables of the kernel, beside those of this process.
    Raises: ValueError for an unknown parameter; nbclient's CellExecutionError if a cell fails.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    sources = [cell.source for cell in cells]
    _set(cells, parameters or {})
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(FOLDER)}})
    try:
        client.execute(env={**os.environ, **environment})
    finally:
        for cell, source in zip(cells, sources, strict=True):
            cell.source = source
    return notebook


def _set(cells: Sequence[NotebookNode], parameters: Mapping[str, Any]):
    for name, value in parameters.items():
        for cell in cells:
            source = re.sub(rf"^{name} = [^#\n]*", lambda _, new=f"{name} = {value!r}": new, cell.source, flags=re.M)
            if source != cell.source or f"{name} = {value!r}" in cell.source:
                cell.source = source
                break
        else:
            raise ValueError(f"no cell tagged 'parameters' sets {name}")


def tidy(notebook: NotebookNode) -> NotebookNode:
    """`notebook` as it is kept: progress bars and this machine's folders left out, and a mark of what was run."""
    home = os.path.expanduser("~")
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter")})
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = _ALARM.sub("", _written(output.text))
                if output.name == "stderr" and _BAR.sub("", output.text).strip() == "":
                    continue
                output.text = output.text.replace(f"{_ROOT}/", "").replace(home, "~")
                if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                    kept[-1].text += output.text
                    continue
            kept.append(output)
        cell.outputs = kept
    metadata = {key: value for key, value in notebook.metadata.items() if key in _KEPT}
    metadata["language_info"] = {"name": "python"}  # its version says nothing of the notebook
    notebook.metadata = NotebookNode(metadata, janus_jax={"run": fingerprint(notebook)})
    return notebook


# XLA's, when a busy machine takes minutes to compile.
_ALARM = re.compile(r"^E\d{4} \S+ +\d+ slow_operation_alarm.*\n\n?\*+\n.*\n\*+\n", re.MULTILINE)
_BAR = re.compile(r"^.*(it/s|s/it|\d+%|\?it).*$", re.MULTILINE)


def _written(text: str) -> str:
    """Text as a terminal would show it."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in _ESCAPES.sub("", text).split("\n")]
    return "\n".join(lines)


def fingerprint(notebook: NotebookNode) -> str:
    """Of the code of all cells as Python reads it: saved outputs are those of this code, whatever its formatting."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    plain = re.sub(r"^(\s*)[%!](.*)$", r"\1_magic(r'''\2''')", code, flags=re.MULTILINE)
    return hashlib.sha256(ast.unparse(ast.parse(plain)).encode()).hexdigest()[:16]


def faults(notebook: NotebookNode) -> list[str]:
    """What a reader of the saved notebook should not meet: errors, warnings, folders of this machine, old outputs."""
    found = []
    if notebook.metadata.get("janus_jax", {}).get("run") != fingerprint(notebook):
        found.append("its outputs are those of other code")
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            text = output.get("text", "") + "".join(output.get("data", {}).get("text/plain", ""))
            if output.output_type == "error":
                found.append(f"cell {number} ends with an error")
            if output.get("name") == "stderr":
                found.append(f"cell {number} writes on standard error: {output.text[:200]!r}")
            if re.search(r"(?<![\w.])/(home|root|tmp|usr|work|content|Users|kaggle)\b", text):
                found.append(f"cell {number} shows a folder of the machine: {text[:200]!r}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m notebooks.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the beginnings of notebooks' names (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set a parameter, as text")
    args = parser.parse_args(argv)
    try:
        parameters = dict(item.split("=", 1) for item in args.set)
        chosen = paths(args.names)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in chosen:
        notebook = read(path)
        try:
            tidy(execute(notebook, parameters))
        except (CellExecutionError, ValueError) as error:
            # Without what the cell wrote, which may be a long progress bar.
            what = getattr(error, "traceback", str(error)).rpartition("------------------")[2]
            print(f"error: {path.name}: {_ESCAPES.sub('', what).strip()}", file=sys.stderr)
            return 1
        nbformat.write(notebook, path)
        for fault in (found := faults(notebook)):
            print(f"{path.name}: {fault}", file=sys.stderr)
        print(f"{path.name}: saved")
        if found:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
