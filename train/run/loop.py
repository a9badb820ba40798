"""A training run: from a configuration to an exported model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from janus_jax.io.progress import shown
from janus_jax.processing.chat import Processor
from janus_jax.sharding import make_mesh
from train.config import TrainConfig
from train.data.fingerprints import check_codes, check_folders
from train.data.prepared import Prepared
from train.data.work import Supervised, Work
from train.overrides import flat
from train.plan.topologies import choose_layout
from train.rl.dpo import Dpo
from train.rl.grpo import Grpo
from train.run.aside import Draw, Evaluate, Export, get_held_out
from train.run.callbacks import Callback, Moment, Profile, Report, Run, Save
from train.run.checkpoints import Workdir, check_steps
from train.run.distributed import check_same, say, together
from train.run.failures import Failures
from train.run.faults import STOPPED, Notice, Stopped, Watchdog
from train.run.figures import benchmark_curves, curves_of, loss_curves
from train.run.flow import Health, InFlight, NotFinite, next_batch
from train.run.metrics import FILE, Metrics
from train.run.window import Window
from train.step.init import first_state, folder_of
from train.step.leaves import changed_slots
from train.step.state import Params, TrainState, abstract_state
from train.validate import check_mesh, validate
from train.watch.benchmarks import Benchmarks, fingerprints, load_tasks
from train.watch.writers import missing


def train(config: TrainConfig, steal: bool = False, more: Sequence[Callable[[Run], Callback]] = ()) -> pathlib.Path:
    """Runs `config` to its last step, from its workdir's newest checkpoint if there is one.

    Every process of a run calls it; only process 0 prints.

    Args:
      steal: take over the workdir from another start that writes to it, or seems to.
      more: callbacks of the caller's, made for the run and called after its own.
    Returns: the exported checkpoint folder.
    Raises: FileNotFoundError or ValueError, in one line, for bad input, before the first step; Stopped if the run ends
      later.
    """
    # ------------------------------------------------------------ inputs
    is_main = jax.process_index() == 0
    with together():
        config = choose_layout(config)
        for remark in validate(config):
            say(f"note: {remark}")
        if is_main and (lines := missing(config.writers)):
            raise ValueError(lines[0])
        mesh = make_mesh(dataclasses.asdict(config.mesh))
        check_mesh(config, mesh)
        tokenizer = folder_of(config.tokenizer or config.init_from)
        processor = Processor.from_folder(tokenizer, config.model)
        work = work_of(config, mesh, processor)
        held_out = get_held_out(config, processor)
        folders = [*work.folders, *(held_out.mixture.folders if held_out else ())]
        check_folders(folders, processor)
        asked = load_tasks(config.evals)
    check_same(flat(config), work.fingerprints | _fingerprints(folders) | fingerprints(asked))

    with (
        Workdir(config, work.fingerprints, steal) as workdir,
        jax.set_mesh(mesh),
        Watchdog(config.watchdog) as watchdog,
        Notice() as notice,
        workdir.storing(),
        contextlib.ExitStack() as closing,
    ):
        # -------------------------------------------------------- state
        watchdog.doing("reading parameters")
        if workdir.latest is None:
            with together():
                state, frozen = first_state(config, mesh, progress=shown(None) and is_main)
            kept = work.first_kept(state, frozen)
            workdir.save_frozen(frozen | kept)
        else:
            check_steps(config, workdir.latest)
            shapes, frozen_shapes = abstract_state(config, mesh)
            kept_shapes = work.kept_shapes(shapes)
            state, stored = workdir.restore(shapes, frozen_shapes | kept_shapes)
            frozen, kept = ({name: stored[name] for name in part} for part in (frozen_shapes, kept_shapes))
        first = int(state.step)
        for remark in check_codes(folders, frozen, mesh):
            say(f"note: {remark}")
        _describe(config, mesh, work, state, frozen, first)

        # -------------------------------------------------------- callbacks
        work.begin(kept)
        closing.callback(work.close)
        batches = work.batches(first)
        failures, window, health = Failures(workdir.folder, workdir.local), Window(config, mesh), Health(config)
        flow = InFlight(window.add, health)
        shown_as = {"writers": config.writers, "name": config.name, "config": flat(config), "shared": workdir.folder}
        with Metrics(workdir.local, config.steps, first, is_main, failures, **shown_as) as metrics:
            run = Run(config, mesh, processor, workdir, metrics, failures, watchdog)
            callbacks = [
                Profile(run),
                Report(run, flow, window, health),
                # First of all that may kill the process, so that no step is lost.
                Save(run),
                Evaluate(run, held_out, work.rows),
                Draw(run),
                Benchmarks(run, asked),
                Export(run),
                *(make(run) for make in more),
            ]
            if first:
                for callback in callbacks:
                    callback.resume(Moment(first, state, frozen, last=first == config.steps))

            # ---------------------------------------------------- steps
            window.start()
            for step in range(first, config.steps):
                done, last = step + 1, step + 1 == config.steps
                for callback in callbacks:
                    callback.before(step)
                watchdog.doing(f"waiting for the data of step {done}")
                with window.waiting():
                    batch, report = next_batch(batches)
                workdir.note_damaged(done, report["problems"])
                watchdog.doing(f"working on step {done}")
                state, out = work.step(state, frozen, batch)
                try:
                    flow.add(step, out, report)
                    window.stop()
                    moment = Moment(done, state, frozen, last, told=notice.after(done) and not last)
                    for callback in callbacks:
                        callback.after(moment)
                except NotFinite as error:
                    workdir.save(done, state)
                    workdir.wait()
                    raise Stopped(f"{error}; saved after step {done}, with the last good update", STOPPED) from None
                window.start()
            for callback in callbacks:
                callback.close()

        # -------------------------------------------------------- outputs
        watchdog.doing("exporting")
        workdir.wait()
        exported = workdir.export(config.steps, state.trained, frozen)
        with failures.alone("the figure of the loss curves"):
            if is_main and (workdir.local / FILE).exists():
                figure = functools.partial(curves_of, names=work.curves) if work.curves else loss_curves
                figure(workdir.local / FILE, workdir.local / "curves.png", title=config.name)
        with failures.alone("the figure of the benchmarks"):
            if is_main and asked and (workdir.local / FILE).exists():
                benchmark_curves(workdir.local / FILE, workdir.local / "evals.png", config.name)
    say(f"{config.name}: {config.steps} steps done; exported to {exported}")
    return exported


def work_of(config: TrainConfig, mesh: Mesh, processor: Processor) -> Work:
    """What the steps of `config` are made of."""
    kind = Grpo if config.grpo else Dpo if config.dpo else Supervised
    return kind(config, mesh, processor)


def _fingerprints(folders: list[Prepared]) -> dict[str, str]:
    return {str(folder.folder): folder.fingerprint for folder in folders}


def _describe(config: TrainConfig, mesh: Mesh, work: Work, state: TrainState, frozen: Params, first: int):
    def count(tree: Any) -> str:
        return f"{sum(x.size for x in jax.tree.leaves(tree)):,}"

    devices = mesh.devices.flat
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    job = f"stage {config.stage}" if config.adapter is None else f"adapter of {config.init_from}"
    say(f"{config.name}: {job}, {len(devices)} x {devices[0].device_kind}, {sizes}")
    what = ", ".join(sorted(state.trained))
    if a := config.adapter:
        what = f"{a.kind} of rank {a.rank} on {len(changed_slots(config))} linear layers"
    say(f"  trained {what}: {count(state.trained)}; frozen: {count(frozen)}")
    say(f"  a step: {work.about(first)}")
    if first:
        say(f"  resuming after step {first}")
