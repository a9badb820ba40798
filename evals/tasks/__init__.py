"""The benchmarks by name."""

from __future__ import annotations

from evals.items import Task

TASKS: dict[str, Task] = {}
