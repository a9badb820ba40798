"""When progress bars are shown by default: in a notebook's kernel, and not because something imported its modules."""

import sys
import types

import pytest

from janus_jax.io import progress


@pytest.mark.parametrize(
    ("shell", "expected"), [(None, False), (types.SimpleNamespace(), False), (types.SimpleNamespace(kernel=1), True)]
)
def test_in_notebook(monkeypatch, shell, expected):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert progress.in_notebook() == expected
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: False))
    assert progress.shown(None) == expected and progress.shown(True) and not progress.shown(False)


def test_without_ipython(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert not progress.in_notebook()
