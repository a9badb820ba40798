"""What would keep a run from starting, found on its own hosts: `python -m train.main --config NAME --dry-run`.

It opens what the run would open, reads headers instead of parameters, compiles the step for the devices that are there,
and writes nothing in the workdir; in a store it writes an object of no bytes and removes it, since rights are known by
using them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from janus_jax.io.messages import error_text, print_error, print_note
from janus_jax.io.stores import StorePath, as_path
from janus_jax.io.whole.in_store import try_to_write
from janus_jax.processing.chat import Processor
from janus_jax.sampling.memory import OutOfMemory, available_bytes
from janus_jax.sharding import make_mesh
from janus_jax.weights.torch_weights import abstract_params
from train.config import KINDS, TrainConfig
from train.data.fingerprints import check_folders
from train.data.mixture import Mixture, open_kind
from train.data.prepared import Prepared
from train.data.work import assembler_of
from train.overrides import flat, to_json
from train.plan.programs import SPARE, lower_step, memory_of
from train.plan.topologies import GIB, choose_layout
from train.rl.rewards import Rewards
from train.run.aside import get_held_out
from train.run.checkpoints import check_claim, check_steps, lease_of
from train.run.distributed import check_same, gather, say
from train.run.faults import BAD_INPUT
from train.run.loop import work_of
from train.step.earlier import RUN, complete_steps
from train.step.init import folder_of, open_sources
from train.step.leaves import abstract_leaves
from train.step.state import batch_sharding, local_rows
from train.validate import check_mesh, examine
from train.watch.benchmarks import Asked, fingerprints, load_tasks
from train.watch.writers import missing

_SOURCES = ("init_from", "language_from", "vision_from", "vq_from")
_SHOWN = 3  # damaged samples of the first batch that are named


class Findings:
    """What this process found: rows of a table, notes, and problems, each in one line."""

    def __init__(self):
        self.rows: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.problems: list[str] = []

    @contextlib.contextmanager
    def problem(self) -> Iterator[None]:
        """An error inside is one more problem, and what follows is looked at too."""
        try:
            yield
        except (OSError, ValueError, OutOfMemory) as error:
            if (text := error_text(error)) not in self.problems:
                self.problems.append(text)


def dry_run(config: TrainConfig, steal: bool = False) -> int:
    """Looks at everything that `config` needs to start, and says what it found; every process of the run calls it.

    Args:
      steal: the run would take over the workdir from another start.
    Returns: 0 if nothing is in the way, else the exit code of bad input, with a line for each problem.
    """
    found = Findings()
    with found.problem():
        config = choose_layout(config)
    found.notes, wrong = examine(config)
    found.problems += wrong
    job = f"stage {config.stage}" if config.adapter is None else f"adapter of {config.init_from}"
    found.rows.append(("config", f"{config.name}: {job}, {config.steps:,} steps of {config.batch_size} rows"))
    mesh = None if wrong else _mesh(found, config)
    found.rows.append(("writers", ", ".join(config.writers)))
    if jax.process_index() == 0:
        found.problems += missing(config.writers)
    processor = _processor(found, config)
    folder, latest = as_path(config.workdir) if not any(line.startswith("workdir") for line in wrong) else None, None
    with found.problem():
        latest = max(complete_steps(folder), default=None) if folder else None
    data = prints = {}
    if config.grpo or config.dpo:
        data = prints = _drawing(found, config, mesh, processor, latest or 0)
    else:
        mixture, folders = _data(found, config, mesh, processor, latest or 0)
        prints = {str(folder.folder): folder.fingerprint for folder in folders}
        data = {str(opened.folder): opened.fingerprint for opened in mixture.folders} if mixture else {}
    asked = _evals(found, config)
    _sources(found, config, latest)
    with found.problem():
        check_same(flat(config), prints | fingerprints(asked))
    _same_folder(found, folder, latest)
    if folder is not None:
        _workdir(found, config, folder, data, latest, steal)
    # Together or not at all, since processes may divide the work of compiling.
    if all(gather("ready" if mesh is not None and processor is not None else "")):
        _memory(found, config, mesh, processor)
    else:
        found.rows.append(("memory", "not known before the problems above are solved"))
    return _report(found, config)


# ---------------------------------------------------------------- what is looked at


def _mesh(found: Findings, config: TrainConfig) -> Mesh | None:
    devices = jax.devices()
    found.rows.append(("devices", f"{len(devices)} x {devices[0].device_kind}, {jax.process_count()} processes"))
    with found.problem():
        mesh = make_mesh(dataclasses.asdict(config.mesh))
        found.rows.append(("mesh", " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())))
        check_mesh(config, mesh)
        return mesh
    return None


def _processor(found: Findings, config: TrainConfig) -> Processor | None:
    source = config.tokenizer or config.init_from
    if source:
        with found.problem():
            processor = Processor.from_folder(folder_of(source), config.model)
            found.rows.append(("tokenizer", source))
            return processor
    return None


def _data(
    found: Findings, config: TrainConfig, mesh: Mesh | None, processor: Processor | None, step: int
) -> tuple[Mixture | None, Sequence[Prepared]]:
    """Opens all prepared folders and makes this process's rows of the batch after `step` steps."""
    opened: dict[str, Prepared] = {}
    before = len(found.problems)
    shares = zip(KINDS, config.data.ratio, strict=False)
    read = [(name, kind) for kind, share in shares if share for name in getattr(config.data, kind)]
    read += [(name, "generation") for name in config.data.early_generation]
    read += [(name, kind) for kind in KINDS if config.evaluation.every for name in getattr(config.evaluation, kind)]
    read = list(dict.fromkeys(read))
    for name, kind in read:
        with found.problem():
            opened[name] = open_kind(name, kind, config.data)
            if processor is not None:
                check_folders([opened[name]], processor)
    total = sum(map(len, opened.values()))
    found.rows.append(("data", f"{len(opened)} of {len(read)} folders opened: {total:,} samples"))
    if mesh is None or processor is None or len(found.problems) > before:
        return None, list(opened.values())
    with found.problem():
        mixture = Mixture(config.data, config.batch_size, config.seed)
        assembler = assembler_of(processor, mixture)
        get_held_out(config, processor)
        rows = local_rows(batch_sharding(mesh), config.batch_size)
        started = time.monotonic()
        batch, report = assembler(min(step, config.steps - 1), rows)
        fill = np.mean(batch["segment_ids"] > 0)
        found.rows.append((
            "batch", f"{len(rows)} rows of {config.data.context}, {fill:.0%} filled, {report['left_out']} groups left "
            f"out, made in {time.monotonic() - started:.1f} s",
        ))  # fmt: skip
        found.notes += [f"damaged, so a run leaves it out: {line}" for line in report["problems"][:_SHOWN]]
        if more := report["problems"][_SHOWN:]:
            found.notes.append(f"{len(more)} more samples of this batch are damaged")
        return mixture, mixture.folders
    return None, list(opened.values())


def _drawing(
    found: Findings, config: TrainConfig, mesh: Mesh | None, processor: Processor | None, step: int
) -> dict[str, str]:
    """Reads the prompts and calls up the rewards of GRPO, or opens the pairs of DPO; returns their fingerprints."""
    if mesh is None or processor is None:
        return {}
    with found.problem():
        work = work_of(config, mesh, processor)
        check_folders(work.folders, processor)
        found.rows.append(("data", work.about(step)))
        if config.grpo:
            Rewards(config.grpo.rewards, config.grpo.rollouts).close()
            found.rows.append(("rewards", ", ".join(reward.function for reward in config.grpo.rewards)))
        return work.fingerprints
    return {}


def _evals(found: Findings, config: TrainConfig) -> list[Asked]:
    """Reads the benchmarks that the run would ask."""
    asked: list[Asked] = []
    with found.problem():
        asked = load_tasks(config.evals)
        for each in asked:
            found.rows.append(("evals", f"{each.task.name} ({each.protocol}): {each.loaded.source}"))
    return asked


def _sources(found: Findings, config: TrainConfig, latest: int | None):
    """Opens what the first parameters would come from, which reads headers only."""
    if latest is not None:
        found.rows.append(("parameters", f"those of the checkpoint after step {latest:,}"))
        return
    named = {key: path for key in _SOURCES if (path := getattr(config, key))}
    parts: dict[str, str] = {}
    for key, path in named.items():
        with found.problem():
            alone = dataclasses.replace(config, **dict.fromkeys(_SOURCES, "") | {key: path})
            parts |= dict.fromkeys(open_sources(alone), key)
    for key, path in named.items():
        if own := [part for part, source in parts.items() if source == key]:
            found.rows.append(("parameters", f"{', '.join(sorted(own))} from {key}={path}"))
    if not named:
        found.rows.append(("parameters", "random, all of them"))
    elif "init_from" not in named and (drawn := sorted(set(abstract_params(config.model)) - set(parts))):
        found.rows.append(("parameters", f"{', '.join(drawn)} at random"))


def _workdir(
    found: Findings, config: TrainConfig, folder: pathlib.Path, data: dict[str, str], latest: int | None, steal: bool
):
    found.rows.append(("workdir", f"{folder}: {'new' if latest is None else f'resumes after step {latest:,}'}"))
    with found.problem():
        check_claim(config, {"config": to_json(config), "data": data})
    with found.problem():
        check_steps(config, latest or 0)
    with found.problem():
        if isinstance(folder, StorePath):
            try_to_write(folder)
        else:
            _room(found, config, _writable(folder), latest)
    if jax.process_index() == 0 and not steal and folder.is_dir():
        with found.problem():
            if waiting := lease_of(folder).look():
                found.notes.append(waiting)


def _writable(folder: pathlib.Path) -> pathlib.Path:
    """`folder`, or the one in which it would be made; ValueError if this process may not write there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    cure = "choose another workdir"
    if not there.is_dir():
        raise ValueError(f"workdir={folder}: {there} is not a folder; {cure}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"workdir={folder}: no permission to write to {there}; get it, or {cure}")
    return there


def _same_folder(found: Findings, folder: pathlib.Path | None, latest: int | None):
    """A problem for each process that sees another run in the workdir than process 0."""
    seen = [latest, ""]
    with found.problem():
        if folder is not None and (folder / RUN).is_file():
            seen[1] = hashlib.sha256((folder / RUN).read_bytes()).hexdigest()
    first, *others = (json.loads(line) for line in gather(json.dumps([seen, socket.gethostname()])))
    for number, (theirs, host) in enumerate(others, 1):
        if theirs != first[0]:
            found.problems.append(
                f"workdir={folder} of process {number} ({host}) is not the folder that process 0 sees; choose a folder "
                "on storage that all hosts share"
            )


def _room(found: Findings, config: TrainConfig, folder: pathlib.Path, latest: int | None):
    """What the storage of `folder` has to hold: ValueError if not even one checkpoint and the export fit."""
    try:
        trained, frozen = abstract_leaves(config)
    except (ValueError, KeyError):
        return  # a problem of the config, which is told as such
    # A checkpoint has the parameters and two moments of each; an export is in bfloat16, an adapter's in float32.
    saved, kept = 3 * _bytes(trained), _bytes(frozen) if latest is None else 0
    export = 4 * _count(trained) if config.adapter else 2 * (_count(trained) + _count(frozen))
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.2f} GiB free; a checkpoint takes {saved / GIB:.2f}, the export {export / GIB:.2f}"
    found.rows.append(("storage", text))
    if free < saved + kept + export:
        raise ValueError(f"workdir={config.workdir}: too little room: {text}; make room, or choose another workdir")
    if latest is None and free < (config.keep + 1) * saved + kept + export:
        found.notes.append(
            f"{config.keep} checkpoints, and another while it is written, may not fit: {text}; lower keep"
        )


def _memory(found: Findings, config: TrainConfig, mesh: Mesh, processor: Processor):
    """Compiles the step and compares what it needs with what the devices of this process have free."""
    say("compiling a training step, which may take minutes ...")
    started = time.monotonic()
    with found.problem():
        try:
            lowered, arguments = lower_step(config, mesh, processor.settings)
            temporaries, peak = memory_of(lowered.compile(), arguments)
        except jax.errors.JaxRuntimeError as error:
            if not OutOfMemory.says(error):
                raise ValueError(f"a training step cannot be compiled: {error_text(error)}") from None
            raise ValueError(f"a training step does not fit in the devices' memory; {_CURE}") from None
        local = mesh.local_devices
        least = min((free for free in map(available_bytes, local) if free is not None), default=None)
        if least is not None and local[0].platform == "cpu":
            least //= len(local)  # they share the host's
        parts = ", ".join(
            f"{name} {size / GIB:.2f}" for name, size in (*arguments.items(), ("temporaries", temporaries))
        )
        text = f"{peak / GIB:.2f} GiB per device ({parts})"
        text += "; what is free is unknown" if least is None else f" of {least / GIB:.2f} free"
        found.rows.append(("memory", f"{text}; compiled in {time.monotonic() - started:.0f} s"))
        if least is not None and peak > least:
            raise ValueError(f"a training step does not fit in the devices' memory: it needs {text}; {_CURE}")
        if least is not None and peak > (1 - SPARE) * least:
            found.notes.append(f"less than {SPARE:.0%} of the devices' memory is to spare: a step needs {text}")


_CURE = "raise accumulate, or give mesh.fsdp more devices"


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------- what is said


def _report(found: Findings, config: TrainConfig) -> int:
    """Prints what all processes found, in process 0; returns the exit code, the same in all."""
    everywhere = [json.loads(t) for t in gather(json.dumps([socket.gethostname(), found.notes, found.problems]))]
    problems = _merged([(host, problems) for host, _, problems in everywhere])
    if jax.process_index() == 0:
        for name, text in found.rows:
            say(f"  {name:11} {text}")
        for line in _merged([(host, notes) for host, notes, _ in everywhere]):
            print_note(line)
        for line in problems:
            print_error(line)
    if not problems:
        say(f"nothing is in the way, and nothing was written to {config.workdir}; start it without --dry-run")
    return BAD_INPUT if problems else 0


def _merged(found: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """The lines of all processes (host, lines): once if all have it, else with the first process that does."""
    lines: dict[str, list[int]] = {}
    for number, (_, own) in enumerate(found):
        for line in own:
            lines.setdefault(line, []).append(number)
    told = []
    for line, numbers in lines.items():
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        every = len(numbers) == len(found)
        told.append(line if every else f"process {numbers[0]} ({found[numbers[0]][0]}){more}: {line}")
    return told
