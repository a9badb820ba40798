"""Tunes a model on one's own data, with an adapter, from files of any format to an adapter that is ready to use.

    python -m train.finetune --model deepseek-ai/Janus-Pro-1B --data photos.jsonl --kind generation --out runs/mine

`finetune` does the same from a notebook. In the folder OUT are the prepared data (`train`, `held_out`) and the run
(`run`); what is there already is not done again, so that the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax import compilation_cache
from janus_jax.config import JanusConfig
from janus_jax.hub import hub_id, resolve
from janus_jax.io.fields import shown
from janus_jax.io.messages import did_you_mean, print_any_text, print_error
from janus_jax.io.progress import in_notebook
from janus_jax.io.stores import as_path
from janus_jax.io.whole.leftovers import remove
from janus_jax.loading import default_dtype
from janus_jax.processing.chat import Processor
from janus_jax.sampling.footprint import params_bytes, refuse_too_large
from janus_jax.sampling.memory import OutOfMemory, least_available_bytes
from janus_jax.weights.checkpoint import Checkpoint, open_checkpoint
from janus_jax.weights.quantize import FORMS
from train.config import AdapterConfig, DataConfig, EvalsConfig, OptimizerConfig, SampleConfig, TrainConfig
from train.data.prepared import open_prepared
from train.prepare import prepare, vq_encoder
from train.raw.sources import open_source
from train.run import faults
from train.run.distributed import say
from train.run.figures import Live
from train.run.loop import train
from train.step.state import activation_bytes
from train.tuning.fitting import fitted, parts, some_captions
from train.validate import validate
from train.watch.benchmarks import load_tasks

KINDS = ("generation", "understanding")
_RATIOS = {"understanding": (1, 0, 0), "generation": (0, 0, 1)}
_CONTEXT = 2048  # tokens of a row at most, unless asked for


def finetune(
    model: str | os.PathLike,
    data: str | os.PathLike,
    kind: str,
    out: str | os.PathLike,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float = 1e-4,
    rank: int = 16,
    alpha: float | None = None,
    adapter: str = "lora",
    targets: Sequence[str] = ("decoder",),
    save: Sequence[str] = (),
    weights: str | None = None,
    dtype: str | None = None,
    context: int = _CONTEXT,
    prompts: Sequence[str] | None = None,
    guidance: float = 5.0,
    temperature: float = 1.0,
    tasks: Sequence[str] = (),
    tasks_data: str | os.PathLike = "",
    tasks_every: int | None = None,
    tasks_limit: int | None = None,
    format: str | None = None,
    images: str | os.PathLike | None = None,
    max_bad_share: float = 0.01,
    seed: int = 0,
    progress: bool | None = None,
) -> pathlib.Path:
    """Trains an adapter of `model` on `data`; the same call goes on where an earlier one was interrupted.

    In a notebook, the output of the cell shows the loss and the newest sample grid.

    Args:
      model: checkpoint folder of any kind, or hub id.
      data: file, folder or glob of any format and schema of `train.raw.sources`.
      kind: 'generation' (captions and their pictures) or 'understanding' (questions and answers about pictures).
      out: folder for everything that is written, local or in a store.
      steps: updates; default by the number of samples: twenty passes over a few dozen, three over thousands.
      batch_size: samples a step, about; default from 4 to 16, by their number.
      rank, alpha, adapter, targets, save, weights: of the adapter: see `AdapterConfig`, where `adapter` is called kind;
        alpha is twice the rank by default, and weights those of `model` if it is quantized.
      dtype: of computation and of the frozen parameters; default as for `janus_jax.load`.
      context: the most tokens of a sample.
      prompts: what to draw four times during the run; default some captions of the data. Empty for no pictures.
      guidance, temperature: with which they are drawn.
      tasks, tasks_data, tasks_every, tasks_limit: benchmarks to ask during the run, four times by default: see
        `EvalsConfig`.
      format, images: as for `open_source`.
      max_bad_share: as for `prepare`.
      progress: whether to show progress bars; default in a terminal or a notebook.
    Returns: the adapter's folder, for `janus_jax.load(model, adapter=...)`, PEFT, or `convert/to_torch.py`.
    Raises: OSError or ValueError in one line for bad input, before anything is written, and for a run that could not
      be finished; `OutOfMemory`, in one line too, if the model or a step does not fit.
    """
    try:
        return _finetune(
            str(model), data, kind, as_path(out), steps=steps, batch_size=batch_size, context=context,
            adapter=AdapterConfig(
                rank, 2.0 * rank if alpha is None else alpha, adapter, tuple(targets), tuple(save), weights
            ),
            dtype=dtype, prompts=prompts, guidance=guidance, temperature=temperature, learning_rate=learning_rate,
            format=format, images=images, max_bad_share=max_bad_share, seed=seed, progress=progress,
            evals=_evals(tasks, tasks_data, tasks_every, tasks_limit),
        )  # fmt: skip
    except faults.Stopped as error:
        kind_of_error = ValueError if error.code == faults.STOPPED else OSError
        raise kind_of_error(str(error)) from None
    except jax.errors.JaxRuntimeError as error:
        if not OutOfMemory.says(error):
            raise
        raise OutOfMemory(
            "a step does not fit in the devices' memory; use a smaller context, or weights int8 or int4"
        ) from None


def _finetune(
    model: str, data: Any, kind: str, out: pathlib.Path, *, steps: int | None, batch_size: int | None, context: int,
    adapter: AdapterConfig, dtype: str | None, prompts: Sequence[str] | None, guidance: float, temperature: float,
    learning_rate: float, format: str | None, images: Any, max_bad_share: float, seed: int, progress: bool | None,
    evals: EvalsConfig,
) -> pathlib.Path:  # fmt: skip
    # ------------------------------------------------------------ inputs
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {shown(kind)}{did_you_mean(str(kind), KINDS)}")
    _check_choices(adapter, dtype, steps, batch_size, context)
    source = open_source(data, format, images)
    folder = resolve(model)
    checkpoint = open_checkpoint(folder, quantized=True)
    adapter = dataclasses.replace(adapter, weights=adapter.weights or checkpoint.weights)
    dtype = dtype or default_dtype(jax.devices()[0])
    config = _config(model, checkpoint.config, kind, out, adapter, dtype, guidance, temperature, learning_rate, seed)
    validate(config)
    load_tasks(dataclasses.replace(evals, every=len(evals.tasks)))
    processor = Processor.from_folder(folder, checkpoint.config, hub_id=hub_id(model))
    _refuse_too_large(config, checkpoint)
    say(str(source))

    # ------------------------------------------------------------ data
    context = min(context, checkpoint.config.language.max_positions)
    encode, fingerprint = vq_encoder(folder) if kind == "generation" else (None, "")
    folders = []
    for part in parts(source):
        with _left_as_it_was(out / part.name):
            report = prepare(
                part, out / part.name, kind, processor, encode=encode, vq_fingerprint=fingerprint, context=context,
                batch_size=min(32, len(part)), max_bad_share=max_bad_share, progress=progress,
            )  # fmt: skip
        dropped = report.read - report.kept
        say(f"{report.folder}: {report.kept:,} samples, {report.tokens:,} tokens; {dropped:,} dropped")
        folders.append(open_prepared(out / part.name))
    del encode

    # ------------------------------------------------------------ the run
    config = fitted(config, folders, context, steps, batch_size)
    config = dataclasses.replace(config, remat=_remat(config))
    if kind == "generation":
        chosen = some_captions(source) if prompts is None else tuple(prompts)
        every = max(1, config.steps // 4) if chosen else 0
        config = dataclasses.replace(config, samples=dataclasses.replace(config.samples, every=every, prompts=chosen))
    if evals.tasks:
        every = evals.every or max(1, config.steps // 4)
        # So that a run that is stopped while it asks goes on asking.
        config = dataclasses.replace(config, evals=dataclasses.replace(evals, every=every), save_every=every)
    exported = train(config, more=(Live,) if in_notebook() else ())
    say(f"the adapter is in {exported}; use it with")
    say(_command(model, exported, config))
    return exported


def _check_choices(adapter: AdapterConfig, dtype: str | None, steps: int | None, batch_size: int | None, context: int):
    for name, value, known in (
        ("adapter", adapter.kind, ("lora", "rslora", "dora")),
        ("weights", adapter.weights, (None, *FORMS)),
        ("dtype", dtype, (None, "bfloat16", "float16", "float32")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(filter(None, known))}, got {shown(value)}")
    for name, value in (("steps", steps), ("batch_size", batch_size), ("context", context), ("rank", adapter.rank)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {shown(value)}")


def _evals(tasks: Sequence[str], data: str | os.PathLike, every: int | None, limit: int | None) -> EvalsConfig:
    """The benchmarks of a run; `every` is 0 where the number of steps decides."""
    for name, value in (("tasks_every", every), ("tasks_limit", limit)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {shown(value)}")
    if bool(tasks) != bool(data):
        raise ValueError("tasks and tasks_data go together; give both, or none")
    if not tasks and (every or limit):
        raise ValueError("tasks_every and tasks_limit are of tasks, and there are none; name tasks, or leave them out")
    return EvalsConfig(every or 0, tuple(tasks), os.fspath(data), limit=limit or 0)


def _config(
    model: str, sizes: JanusConfig, kind: str, out: pathlib.Path, adapter: AdapterConfig, dtype: str,
    guidance: float, temperature: float, learning_rate: float, seed: int,
) -> TrainConfig:  # fmt: skip
    """The run, as far as it does not depend on what the data are."""
    rows = sizes.language.max_positions
    return TrainConfig(
        name=out.resolve().name,
        workdir=str(out / "run"),
        model=sizes,
        stage=3,
        adapter=adapter,
        init_from=model,
        steps=1,
        batch_size=1,
        data=DataConfig(**{kind: (str(out / "train"),)}, ratio=_RATIOS[kind], context=rows, workers=0),
        optimizer=OptimizerConfig(learning_rate=learning_rate, schedule="cosine", b2=0.99),
        seed=seed,
        compute_dtype=dtype,
        frozen_dtype=dtype,
        loss_chunk=math.gcd(rows, 512),
        samples=SampleConfig(images=2, guidance=guidance, temperature=temperature),
        keep=1,
    )


def _refuse_too_large(config: TrainConfig, checkpoint: Checkpoint):
    if len(jax.devices()) == 1:  # on several, they are split
        refuse_too_large(
            config.init_from, config.model, jnp.dtype(config.frozen_dtype), config.adapter.weights, None, None,
            stored=bool(checkpoint.weights),
        )  # fmt: skip


def _command(model: str, exported: pathlib.Path, config: TrainConfig) -> str:
    weights = f" --weights {config.adapter.weights}" if config.adapter.weights else ""
    given = f"--model {shlex.quote(model)} --adapter {shlex.quote(str(exported))}{weights}"
    if config.data.understanding:
        return f"    python -m janus_jax chat {given} --image PICTURE 'your question'"
    prompt = shlex.quote(config.samples.prompts[0] if config.samples.prompts else "your prompt")
    how = f"--guidance {config.samples.guidance:g} --temperature {config.samples.temperature:g}"
    return f"    python -m janus_jax generate {given} --prompt {prompt} {how} --out drawn"


@contextlib.contextmanager
def _left_as_it_was(folder: pathlib.Path) -> Iterator[None]:
    """Removes `folder` after bad input, unless it was there before: else the mended data would not be those begun."""
    existed, parent = folder.exists(), folder.parent.exists()
    try:
        yield
    except ValueError:
        if not existed:
            with contextlib.suppress(OSError):
                remove(folder)
        if not parent:
            with contextlib.suppress(OSError):  # not empty
                folder.parent.rmdir()
        raise


def _remat(config: TrainConfig) -> str:
    """Nothing is computed twice where that takes a small part of the memory left beside the frozen parameters."""
    free = least_available_bytes(None)
    if free is None:
        return "full"
    # As if one device held them all: the mesh is chosen later.
    free -= params_bytes(config.model, jnp.dtype(config.frozen_dtype), config.adapter.weights)
    on_cpu = jax.devices()[0].platform == "cpu"
    return "none" if 4 * activation_bytes(config, 1 if on_cpu else len(jax.devices())) <= free else "full"


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 on success, 2 for bad input (with one line on standard error), 130 if interrupted."""
    print_any_text()
    compilation_cache.enable()
    given = vars(_parser().parse_args(argv))
    if given.pop("no_samples"):
        given["prompts"] = ()
    try:
        finetune(**{name: value for name, value in given.items() if value is not None})
    except (OSError, ValueError, OutOfMemory) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.finetune", description="Tunes a model on your own data, with an adapter."
    )
    parser.add_argument("--model", required=True, help="checkpoint folder (any layout) or hub id")
    parser.add_argument("--data", required=True, metavar="PATH", help="file, folder or glob")
    parser.add_argument("--kind", choices=KINDS, required=True, help="what it learns")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the data, the run and the adapter")
    parser.add_argument("--format", metavar="FORMAT", help="of the data, as for train.prepare (default: detected)")
    parser.add_argument("--images", metavar="DIR", help="folder for image paths (default: that of the data)")
    parser.add_argument("--max-bad-share", type=float, help="stop above this share of bad samples (default 0.01)")
    parser.add_argument("--steps", type=int, help="updates (default: by the number of samples)")
    parser.add_argument("--batch-size", type=int, help="samples a step, about (default: by their number)")
    parser.add_argument("--learning-rate", type=float, help="default 1e-4")
    parser.add_argument("--rank", type=int, help="of the adapter (default 16)")
    parser.add_argument("--alpha", type=float, help="of the adapter (default: twice the rank)")
    parser.add_argument("--adapter", choices=("lora", "rslora", "dora"), help="its kind (default lora)")
    parser.add_argument("--targets", type=_list, metavar="NAME,...", help="layers to change (default decoder)")
    parser.add_argument("--save", type=_list, metavar="NAME,...", help="modules to train whole (default none)")
    parser.add_argument("--weights", choices=FORMS, help="form of the frozen kernels (default: as --dtype)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as for janus_jax")
    parser.add_argument("--context", type=int, help=f"the most tokens of a sample (default {_CONTEXT})")
    parser.add_argument(
        "--prompt", dest="prompts", action="append", help="what to draw during the run; may be given several times"
    )
    parser.add_argument("--no-samples", action="store_true", help="draw nothing during the run")
    parser.add_argument("--guidance", type=float, help="with which it draws (default 5)")
    parser.add_argument("--temperature", type=float, help="with which it draws (default 1)")
    parser.add_argument("--tasks", type=_list, metavar="NAME,...", help="benchmarks to ask on the way, as evals.main")
    parser.add_argument("--tasks-data", metavar="DIR", help="the folder of their data")
    parser.add_argument("--tasks-every", type=int, metavar="N", help="steps between them (default a quarter of all)")
    parser.add_argument("--tasks-limit", type=int, metavar="N", help="ask at most so many items of each (default all)")
    parser.add_argument("--seed", type=int, help="of data order and adapter (default 0)")
    return parser


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(","))


if __name__ == "__main__":
    faults.own_process()
    sys.exit(main())
