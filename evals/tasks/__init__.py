"""The benchmarks by name."""

from __future__ import annotations

from evals.items import Task
from evals.tasks.mme import Mme
from evals.tasks.pope import Pope

TASKS: dict[str, Task] = {task.name: task for task in (Pope(), Mme())}
