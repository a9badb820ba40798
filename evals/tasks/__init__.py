"""The benchmarks by name."""

from __future__ import annotations

from evals.items import Task
from evals.tasks.dpg import Dpg
from evals.tasks.geneval import GenEval
from evals.tasks.gqa import Gqa
from evals.tasks.mmbench import MmBench
from evals.tasks.mme import Mme
from evals.tasks.mmmu import Mmmu
from evals.tasks.mmvet import MmVet
from evals.tasks.pope import Pope
from evals.tasks.seed import Seed

_EVERY = (Pope(), Mme(), MmBench(), Seed(), Gqa(), Mmmu(), MmVet(), GenEval(), Dpg())
TASKS: dict[str, Task] = {task.name: task for task in _EVERY}
