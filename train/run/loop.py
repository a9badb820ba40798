"""A training run: from a configuration to an exported model."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from janus_jax.io.messages import one_line
from janus_jax.io.progress import shown
from janus_jax.processing.chat import Processor
from janus_jax.sharding import make_mesh
from train.config import TrainConfig
from train.data.batches import Assembler, Batch, load_batches
from train.data.fingerprints import check_codes
from train.data.mixture import Mixture
from train.data.tokenize import resized_by, tokenizer_fingerprint
from train.overrides import flat
from train.plan.topologies import choose_layout
from train.run.aside import Aside, get_held_out
from train.run.checkpoints import Workdir
from train.run.distributed import check_same, say, together
from train.run.failures import Failures
from train.run.faults import AGAIN, STOPPED, STORAGE, Notice, Stopped, Watchdog
from train.run.figures import loss_curves
from train.run.metrics import FILE, Metrics
from train.run.window import NotFinite, Profile, Window
from train.step.init import first_state
from train.step.state import Params, TrainState, abstract_state, batch_sharding, local_rows, put_rows
from train.step.step import make_train_step
from train.validate import check_mesh, validate


def train(config: TrainConfig, steal: bool = False) -> pathlib.Path:
    """Runs `config` to its last step, from its workdir's newest checkpoint where there is one.

    Every process of a run calls it; the console is process 0's.

    Args:
      steal: take the workdir from another start that writes to it, or seems to.
    Returns: the exported checkpoint folder.
    Raises: FileNotFoundError or ValueError, in one line, for what cannot work, before the first step; Stopped for what
      ends the run later.
    """
    # ------------------------------------------------------------ what the run is made of
    is_main = jax.process_index() == 0
    with together():
        config = choose_layout(config)
        for remark in validate(config):
            say(f"note: {remark}")
        mesh = make_mesh(dataclasses.asdict(config.mesh))
        check_mesh(config, mesh)
        tokenizer = pathlib.Path(config.tokenizer or config.init_from)
        processor = Processor.from_folder(tokenizer, config.model)
        mixture = Mixture(config.data, config.batch_size, config.seed)
        _check_folders(mixture, processor)
        assembler = Assembler(
            mixture, processor.settings, processor.tokenizer.pad_id, processor.tokenizer.image_placeholder_id
        )
        held_out = get_held_out(config, assembler)
        if held_out:
            _check_folders(held_out.mixture, processor)
        rows = local_rows(batch_sharding(mesh), config.batch_size)
    data = _fingerprints(mixture)
    check_same(flat(config), data | (_fingerprints(held_out.mixture) if held_out else {}))

    with (
        Workdir(config, data, steal) as workdir,
        jax.set_mesh(mesh),
        Watchdog(config.watchdog) as watchdog,
        Notice() as notice,
        workdir.storing(),
    ):
        # -------------------------------------------------------- state
        watchdog.doing("reading parameters")
        if workdir.latest is None:
            with together():
                state, frozen = first_state(config, mesh, progress=shown(None) and is_main)
            workdir.save_frozen(frozen)
        else:
            if workdir.latest > config.steps:
                raise ValueError(
                    f"steps={config.steps}, but {workdir.folder} is at step {workdir.latest} already; "
                    "raise steps, or choose another workdir"
                )
            state, frozen = workdir.restore(*abstract_state(config, mesh))
        first = int(state.step)
        for remark in check_codes([*mixture.folders, *(held_out.mixture.folders if held_out else ())], frozen, mesh):
            say(f"note: {remark}")
        _describe(config, mesh, mixture, state, frozen, first)

        # -------------------------------------------------------- steps
        step_fn = make_train_step(config, mesh, processor.settings)
        failures = Failures(workdir.folder)
        window, profile = Window(config, mesh), Profile(config, workdir.folder / "profile", is_main)
        batches = load_batches(assembler, rows, first, config.steps, config.data.workers)
        with Metrics(workdir.folder, config.steps, first, is_main, failures) as metrics:
            aside = Aside(config, mesh, processor, held_out, rows, workdir, metrics, failures)
            watchdog.doing(f"evaluating and drawing after step {first}")
            if first:
                aside.catch_up(first, state, frozen)
            window.pause()
            for step in range(first, config.steps):
                with failures.alone("the profile"):
                    profile.at(step)
                done, last = step + 1, step + 1 == config.steps
                watchdog.doing(f"waiting for the data of step {done}")
                with window.waiting():
                    batch, report = _next(batches)
                workdir.note_damaged(done, report["problems"])
                watchdog.doing(f"working on step {done}")
                state, out = step_fn(state, frozen, put_rows(batch, rows, mesh, config.batch_size))
                try:
                    window.add(step, out, report)
                    told = notice.after(done) and not last
                    if done % config.log_every == 0 or last or told:
                        summary = window.summary()
                        workdir.check()
                        with failures.alone("the metrics"):
                            metrics.write(done, summary | {"failures": failures.count})
                except NotFinite as error:
                    workdir.save(done, state)
                    workdir.wait()
                    raise Stopped(f"{error}; saved after step {done}, as after the last good update", STOPPED) from None
                watchdog.doing(f"saving after step {done}")
                if told or last or done % config.save_every == 0:
                    workdir.save(done, state)
                if told:
                    workdir.wait()
                    raise Stopped(f"told to end; saved after step {done}, and the same command goes on", AGAIN)
                # After the checkpoint, and once it is whole: what kills the process here costs no step.
                if aside.due(done):
                    workdir.wait()
                    watchdog.doing(f"evaluating, drawing or exporting after step {done}")
                    aside.after(done, state, frozen)
                window.pause()
        with failures.alone("the profile"):
            profile.stop()

        # -------------------------------------------------------- what is left behind
        watchdog.doing("exporting")
        workdir.wait()
        exported = workdir.export(config.steps, state.trained, frozen)
        with failures.alone("the picture of the loss curves"):
            if is_main and (workdir.folder / FILE).exists():
                loss_curves(workdir.folder / FILE, workdir.folder / "curves.png", config.name)
    say(f"{config.name}: {config.steps} steps done; load {exported}")
    return exported


# ---------------------------------------------------------------- before the first step


def _fingerprints(mixture: Mixture) -> dict[str, str]:
    return {str(folder.folder): folder.fingerprint for folder in mixture.folders}


def _check_folders(mixture: Mixture, processor: Processor):
    """Refuses data that were prepared for another model."""
    ours = tokenizer_fingerprint(processor)
    for folder in mixture.folders:
        settings = folder.meta["settings"]
        if settings["tokenizer"] != ours:
            raise ValueError(f"{folder.folder} was prepared with another tokenizer; prepare it again with this model")
        patches, expected = settings["patches"], processor.config.vision.num_patches
        if folder.kind == "understanding" and patches != expected:
            raise ValueError(f"{folder.folder} was prepared for {patches} patches an image, the model has {expected}")
        resized, expected = settings.get("resized"), list(resized_by(processor.settings))
        if resized and resized != expected:
            raise ValueError(
                f"{folder.folder} stores pictures resized for other image settings ({resized}, the model's are "
                f"{expected}); prepare it again with this model"
            )
        codes, expected = len(folder[0].codes), processor.config.gen_vision.num_tokens
        if folder.kind == "generation" and codes != expected:
            raise ValueError(f"{folder.folder} was prepared for {codes} codes an image, the model has {expected}")


def _describe(config: TrainConfig, mesh: Mesh, mixture: Mixture, state: TrainState, frozen: Params, first: int):
    def count(tree: Any) -> str:
        return f"{sum(x.size for x in jax.tree.leaves(tree)):,}"

    devices = mesh.devices.flat
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    samples = {kind: mixture.groups(first) * part for kind, part in mixture.ratio.items()}
    say(f"{config.name}: stage {config.stage}, {len(devices)} x {devices[0].device_kind}, {sizes}")
    say(f"  trained {', '.join(sorted(state.trained))}: {count(state.trained)}; frozen: {count(frozen)}")
    say(f"  a step: {config.batch_size} rows of {config.data.context}, samples {samples}")
    if first:
        say(f"  going on after step {first}")


def _next(batches: Iterator[tuple[int, Batch, dict[str, Any]]]) -> tuple[Batch, dict[str, Any]]:
    try:
        return next(batches)[1:]
    except OSError as error:
        told = one_line(error, 300)
        raise Stopped(
            f"the data could not be read, though nothing says that they are damaged: {told}; when the machine can read "
            "them again, the same command goes on from the last checkpoint",
            STORAGE,
            alone=True,
        ) from error
    except RuntimeError as error:  # grain's, when a worker process has died
        raise Stopped(
            f"a process that reads data has died ({str(error).splitlines()[0]}); if it was for want of memory, lower "
            "data.workers; the same command goes on from the last checkpoint",
            STOPPED,
            alone=True,
        ) from None
