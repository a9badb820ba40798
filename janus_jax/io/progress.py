"""Progress bars, on standard error."""

from __future__ import annotations

import sys

from tqdm import tqdm


def shown(progress: bool | None) -> bool:
    """Whether to show progress: as requested; by default, in a terminal or a notebook."""
    if progress is not None:
        return progress
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Whether this code runs in a notebook's kernel, whatever has been imported."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and hasattr(get_shell(), "kernel")


def step_bar(description: str, steps: int, enabled: bool) -> tqdm:
    """A bar over `steps` steps."""
    return tqdm(desc=description, total=steps, unit="step", disable=not enabled, file=sys.stderr)


def byte_bar(description: str, num_bytes: int, enabled: bool) -> tqdm:
    """A bar over `num_bytes`."""
    settings = {"unit": "B", "unit_scale": True, "mininterval": 0.5, "file": sys.stderr}
    return tqdm(desc=description, total=num_bytes, disable=not enabled, **settings)
