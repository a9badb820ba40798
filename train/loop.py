"""A training run: from a configuration to an exported model."""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from janus_jax.images import contact_sheet
from janus_jax.messages import one_line
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing import Processor
from janus_jax.progress import shown
from janus_jax.sharding import batch_shards, make_mesh
from train.batches import TASKS, Assembler, Batch, load_batches
from train.checkpoints import DAMAGED, Workdir
from train.config import KINDS, DataConfig, TrainConfig
from train.distributed import check_same, together
from train.faults import AGAIN, STOPPED, STORAGE, Notice, Stopped, Watchdog
from train.figures import loss_curves
from train.fingerprints import check_codes
from train.flops import peak_flops, step_flops
from train.loss import means
from train.metrics import FILE, Metrics
from train.mixture import Mixture
from train.overrides import flat
from train.state import Params, TrainState, abstract_state, batch_sharding, first_state, make_model
from train.step import make_eval_step, make_train_step
from train.tokenise import tokenizer_fingerprint
from train.topologies import settle
from train.validate import validate

_AHEAD = 2  # steps given to the device before the one it works on is done


def train(config: TrainConfig) -> pathlib.Path:
    """Runs `config` to its last step, from its workdir's newest checkpoint where there is one.

    Every process of a run calls it; the console is process 0's.

    Returns: the exported checkpoint folder.
    Raises: FileNotFoundError or ValueError, in one line, for what cannot work, before the first step; Stopped for what
      ends the run later.
    """
    # ------------------------------------------------------------ what the run is made of
    is_main = jax.process_index() == 0
    with together():
        config = settle(config)
        for remark in validate(config):
            _say(f"note: {remark}")
        mesh = make_mesh(dataclasses.asdict(config.mesh))
        check_mesh(config, mesh)
        tokenizer = pathlib.Path(config.tokenizer or config.init_from)
        processor = Processor.from_folder(tokenizer, config.model)
        mixture = Mixture(config.data, config.batch_size, config.seed)
        _check_folders(mixture, processor)
        assembler = Assembler(
            mixture, processor.settings, processor.tokenizer.pad_id, processor.tokenizer.image_placeholder_id
        )
        held_out = _held_out(config, assembler)
        if held_out:
            _check_folders(held_out.mixture, processor)
        rows = local_rows(batch_sharding(mesh), config.batch_size)
    data = _fingerprints(mixture)
    check_same(flat(config), data | (_fingerprints(held_out.mixture) if held_out else {}))

    with (
        Workdir(config, data) as workdir,
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
            _say(f"note: {remark}")
        _describe(config, mesh, mixture, state, frozen, first)

        # -------------------------------------------------------- steps
        step_fn = make_train_step(config, mesh, processor.settings)
        evaluate = _Evaluator(config, mesh, held_out, rows, processor.settings)
        window, profile = _Window(config, mesh), _Profile(config, workdir.folder / "profile", is_main)
        batches = load_batches(assembler, rows, first, config.steps, config.data.workers)
        with Metrics(workdir.folder, config.steps, first, enabled=is_main) as metrics:
            for step in range(first, config.steps):
                profile.at(step)
                done, last = step + 1, step + 1 == config.steps
                watchdog.doing(f"waiting for the data of step {done}")
                with window.waiting():
                    batch, report = _next(batches)
                workdir.note_damaged(done, report["problems"])
                watchdog.doing(f"working on step {done}")
                state, out = step_fn(state, frozen, _put(batch, rows, mesh, config.batch_size))
                try:
                    window.add(step, out, report)
                    told = notice.after(done) and not last
                    if done % config.log_every == 0 or last or told:
                        metrics.write(done, window.summary())
                except NotFinite as error:
                    workdir.save(done, state)
                    workdir.wait()
                    raise Stopped(f"{error}; saved after step {done}, as after the last good update", STOPPED) from None
                if told:
                    watchdog.doing("saving")
                    workdir.save(done, state)
                    workdir.wait()
                    raise Stopped(f"told to end; saved after step {done}, and the same command goes on", AGAIN)
                watchdog.doing(f"evaluating, drawing or saving after step {done}")
                if held_out and config.evaluation.every and (done % config.evaluation.every == 0 or last):
                    metrics.write(done, evaluate(state, frozen), prefix="eval")
                if config.samples.every and (done % config.samples.every == 0 or last):
                    draw_samples(config, processor, mesh, state, frozen, workdir.folder / "samples" / f"{done:07d}.png")
                # Saved last: a step that is not saved is done again, with all that belongs to it.
                if config.export_every and done % config.export_every == 0:
                    workdir.export(done, state.trained, frozen, tokenizer)
                if done % config.save_every == 0 or last:
                    workdir.save(done, state)
                window.pause()
        profile.stop()
        watchdog.doing("exporting")

        # -------------------------------------------------------- what is left behind
        workdir.wait()
        exported = workdir.export(config.steps, state.trained, frozen, tokenizer)
    if is_main and (workdir.folder / FILE).exists():
        loss_curves(workdir.folder / FILE, workdir.folder / "curves.png", config.name)
    _say(f"{config.name}: {config.steps} steps done; load {exported}")
    return exported


def _say(line: str):
    if jax.process_index() == 0:
        print(line, flush=True)


# ---------------------------------------------------------------- before the first step


def check_mesh(config: TrainConfig, mesh: Mesh):
    """ValueError in one line where `mesh` does not suit the rest of `config`."""
    shards = batch_shards(mesh)
    if config.batch_size % (config.accumulate * shards):
        raise ValueError(
            f"batch_size={config.batch_size} does not divide into accumulate={config.accumulate} parts over "
            f"{shards} data x fsdp shards of the mesh; make it a multiple of {config.accumulate * shards}"
        )


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
        codes, expected = len(folder[0].codes), processor.config.gen_vision.num_tokens
        if folder.kind == "generation" and codes != expected:
            raise ValueError(f"{folder.folder} was prepared for {codes} codes an image, the model has {expected}")


def _held_out(config: TrainConfig, assembler: Assembler) -> Assembler | None:
    """Assembles batches of the evaluation's folders: all kinds alike, and nothing dropped or cut."""
    folders = {kind: getattr(config.evaluation, kind) for kind in KINDS}
    if not any(folders.values()) or not config.evaluation.every:
        return None
    data = DataConfig(
        **folders,
        ratio=tuple(int(bool(folders[kind])) for kind in KINDS),
        context=config.data.context,
        images_per_row=config.data.images_per_row,
        guidance_dropout=0.0,
        text_loss=config.data.text_loss,
    )
    mixture = Mixture(data, config.batch_size, seed=0)
    return dataclasses.replace(assembler, mixture=mixture)


def _describe(config: TrainConfig, mesh: Mesh, mixture: Mixture, state: TrainState, frozen: Params, first: int):
    def count(tree: Any) -> str:
        return f"{sum(x.size for x in jax.tree.leaves(tree)):,}"

    devices = mesh.devices.flat
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    samples = {kind: mixture.groups(first) * part for kind, part in mixture.ratio.items()}
    _say(f"{config.name}: stage {config.stage}, {len(devices)} x {devices[0].device_kind}, {sizes}")
    _say(f"  trained {', '.join(sorted(state.trained))}: {count(state.trained)}; frozen: {count(frozen)}")
    _say(f"  a step: {config.batch_size} rows of {config.data.context}, samples {samples}")
    if first:
        _say(f"  going on after step {first}")


# ---------------------------------------------------------------- batches on the mesh


def local_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold."""
    spans = {
        index[0].indices(batch_size)[:2] for index in sharding.addressable_devices_indices_map((batch_size,)).values()
    }
    return sorted({row for begin, end in spans for row in range(begin, end)})


def _put(batch: Batch, rows: Sequence[int], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays [batch_size, ...] of this process's `rows`."""
    place = {row: i for i, row in enumerate(rows)}
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(batch_size)
            return x[place[begin] : place[end - 1] + 1]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return {name: put(x) for name, x in batch.items()}


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


# ---------------------------------------------------------------- what is reported


class NotFinite(Exception):
    """Too many updates in a row were left out."""


class _Window:
    """What happened since the last report."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self._config, self._devices = config, mesh.devices.size
        self._peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._pending: collections.deque[tuple[int, dict[str, jax.Array], int]] = collections.deque()
        self._bad = self._samples = self._skipped = 0
        self._reset()

    def _reset(self):
        self._outs: list[dict[str, float]] = []
        self._reports: list[dict[str, Any]] = []
        self._waited, self._elapsed, self._since = 0.0, 0.0, time.monotonic()

    def waiting(self) -> _Timer:
        """A context whose time counts as waiting for data."""
        return _Timer(self)

    def pause(self):
        """What was done since the last `add` (saving, evaluating, drawing) is no part of the steps' time."""
        self._since = time.monotonic()

    def add(self, step: int, out: dict[str, jax.Array], report: dict[str, Any]):
        """Takes in one step, and waits for an earlier one lest the device be given ever more of them."""
        self._pending.append((step, out, report["samples"]))
        self._reports.append(report)
        while len(self._pending) > _AHEAD:
            self._collect()
        now = time.monotonic()
        self._elapsed, self._since = self._elapsed + now - self._since, now

    def _collect(self):
        step, out, samples = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(out).items()}
        self._outs.append(values)
        self._check_damaged(values["damaged"], samples)
        self._check_finite(step, values)

    def _check_damaged(self, damaged: float, samples: int):
        # Counted over all rows by the step itself, so that all processes stop at the same one.
        self._bad += int(damaged)
        self._samples += samples
        share = self._config.data.max_bad_share
        if self._bad > max(share * self._samples, 1 if share else 0):
            raise Stopped(
                f"{self._bad} of {self._samples} samples were damaged, more than data.max_bad_share={share}; "
                f"{self._config.workdir}/{DAMAGED} names them",
                STOPPED,
            )

    def _check_finite(self, step: int, values: dict[str, float]):
        if values["finite"]:
            self._skipped = 0
            return
        self._skipped += 1
        kinds = [kind for kind in TASKS if not np.isfinite(values[f"loss_{kind}"])]
        what = ", ".join(kinds) or "a gradient"
        _say(f"step {step + 1}: {what} is not finite; the update is left out")
        if self._skipped >= self._config.max_skipped:
            raise NotFinite(f"{what} was not finite in {self._skipped} steps in a row (max_skipped), up to {step + 1}")

    def summary(self) -> dict[str, float]:
        """Means since the last summary; waits for all steps taken in."""
        start = time.monotonic()
        while self._pending:
            self._collect()
        elapsed = self._elapsed + time.monotonic() - start
        outs, reports, config = self._outs, self._reports, self._config
        sums = {name: sum(out[name] for out in outs if out["finite"]) for name in outs[0]}
        tokens = sum(report["tokens"] for report in reports)
        values = means(sums)
        values |= {
            "grad_norm": outs[-1]["grad_norm"],
            "learning_rate": outs[-1]["learning_rate"],
            "tokens_per_second": tokens / elapsed,
            "seconds_per_step": elapsed / len(outs),
            "data_wait": self._waited / elapsed,
            "fill": tokens / (len(reports) * config.batch_size * config.data.context),
            "left_out_groups": sum(report["left_out"] for report in reports),
            "bad_samples": self._bad,
            "skipped_updates": sum(not out["finite"] for out in outs),
        }
        if self._peak:
            flops = sum(map(self._flops, outs, reports))
            values["mfu"] = flops / (elapsed * self._devices * self._peak)
        self._reset()
        return values

    def _flops(self, out: dict[str, float], report: dict[str, Any]) -> float:
        image_targets = out["tokens_generation"]
        text_targets = out["tokens"] - image_targets
        return step_flops(
            self._config, report["tokens"], report["images"], text_targets, image_targets, report["sample_length"]
        )


class _Timer:
    def __init__(self, window: _Window):
        self._window = window

    def __enter__(self):
        self._start = time.monotonic()

    def __exit__(self, *_):
        self._window._waited += time.monotonic() - self._start


class _Evaluator:
    """Mean losses over the evaluation's batches, which are made once."""

    def __init__(self, config: TrainConfig, mesh: Mesh, assembler: Assembler | None, rows: Sequence[int], settings):
        self._mesh, self._rows, self._size = mesh, rows, config.batch_size
        self._assembler, self._count = assembler, config.evaluation.batches
        self._step = make_eval_step(config, mesh, settings)
        self._batches: list[Batch] = []

    def __call__(self, state: TrainState, frozen: Params) -> dict[str, float]:
        if not self._batches:
            made = [self._assembler(number, self._rows) for number in range(self._count)]
            self._batches = [batch for batch, _ in made]
            for problem in (problem for _, report in made for problem in report["problems"]):
                _say(f"evaluation: left out {problem}")
        outs = [self._step(state.trained, frozen, _put(b, self._rows, self._mesh, self._size)) for b in self._batches]
        outs = jax.device_get(outs)
        return means({name: sum(float(out[name]) for out in outs) for name in outs[0]})


def draw_samples(
    config: TrainConfig, processor: Processor, mesh: Mesh, state: TrainState, frozen: Params, path: pathlib.Path
):
    """Draws the config's sample prompts as they stand after this step and writes them as one picture."""
    s = config.samples
    model = make_model(config)
    params = _cast({**state.trained, **frozen}, model.dtype)
    pipeline = JanusPipeline(config.model, params, model, processor, mesh)
    images = pipeline.generate_images(s.prompts, s.images, s.guidance, s.temperature, progress=False)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images, columns=s.images, gap=2).save(path)


@functools.partial(jax.jit, static_argnums=1)
def _cast(tree: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


class _Profile:
    """The trace of the steps that the config names, or of as many of them as this process does."""

    def __init__(self, config: TrainConfig, folder: pathlib.Path, is_main: bool):
        self._folder, self._running = folder, False
        steps = config.profile_steps if is_main else 0
        self._steps = range(config.profile_start, config.profile_start + steps)

    def at(self, step: int):
        """Starts or stops the trace where `step` is about to begin."""
        if step not in self._steps:
            self.stop()
        elif not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def stop(self):
        """Writes the trace, if there is one."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
