"""Seconds per training step, tokens/s and MFU of the real step, for packed and padded rows and several settings.

`python -m benchmarks.training --preset janus_pro_1b --layers 4 --rows 1 --context 2048` runs stage 3, in which all but
the VQ tokenizer trains, with fewer layers of decoder and SigLIP. Rows are packed with random samples of all kinds until
no more fit; the padded variant has the same samples, one per row, and 'lora' trains an adapter of rank 16 on the
decoder over the same rows instead, on bfloat16, int8 or int4 kernels. Recomputation (`remat`) and the tokens of a row
whose logits are in memory at a time (`loss_chunk`) are varied one by one. Weights are random, samples new in every
step. Only tokens of samples are counted, never padding; FLOPs are those that the model needs (`train.plan.flops`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common import device as _device
from benchmarks.common import runs as common
from janus_jax.config import PRESETS
from janus_jax.io.messages import print_any_text

STAGE = "1b_stage3"
_REMATS = ("none", "dots", "attention", "full")
_IMAGES_PER_ROW = 4
# Rows whose step trains an adapter, and the quantized form of the kernels below it.
_ADAPTERS: dict[str, Any] = {"lora": None, "lora-int8": "int8", "lora-int4": "int4"}
_TRIES = 64  # samples that are tried until no more fit
# What a run tells, in the table's order.
_COLUMNS = {
    "rows": "rows a device", "fill": "fill %", "step": "step s", "rate": "tokens/s a device",
    "flops": "TFLOP/s a device", "mfu": "MFU %", "arguments": "state and batch GiB", "temporaries": "temporaries GiB",
    "compile": "compile s",
}  # fmt: skip


def variants_of(context: int) -> list[str]:
    """'<rows> <remat> <loss_chunk>' of all settings."""
    usual = min(512, context)
    others = [chunk for chunk in (context // 8, context) if chunk != usual]
    packed = [f"packed {remat} {usual}" for remat in _REMATS] + [f"packed full {chunk}" for chunk in others]
    return [*packed, f"padded full {usual}", *(f"{kind} full {usual}" for kind in _ADAPTERS)]


def make_config(args: argparse.Namespace, kind: str, remat: str, chunk: int) -> Any:
    """The stage's config with the sizes asked for; batch_size is still that of the stage."""
    from train.config import AdapterConfig
    from train.overrides import load_config

    config, model = load_config(STAGE), PRESETS[args.preset]
    if args.layers:
        fewer = {part: dataclasses.replace(getattr(model, part), layers=min(args.layers, getattr(model, part).layers))
                 for part in ("language", "vision")}  # fmt: skip
        model = dataclasses.replace(model, **fewer)
    data = dataclasses.replace(config.data, context=args.context, images_per_row=_IMAGES_PER_ROW)
    dtype = _device.default_dtype()
    adapter = AdapterConfig(weights=_ADAPTERS[kind]) if kind in _ADAPTERS else None
    return dataclasses.replace(
        config, model=model, data=data, remat=remat, loss_chunk=chunk, compute_dtype=dtype, frozen_dtype=dtype,
        adapter=adapter,
    )  # fmt: skip


# ---------------------------------------------------------------- samples


def draw_lengths(config: Any, rows: int) -> tuple[list[tuple[str, int]], list[list[int]]]:
    """(kind, text tokens) of random samples that fill `rows`, and which of them share a row.

    Kinds come in the stage's ratio. Questions and answers are 40 to 300 tokens beside the image's, texts 50 to 1,000,
    prompts of images to be drawn 8 to 64, each at most a fifth of the context.
    """
    from train.config import KINDS
    from train.data.packing import pack

    data, model = config.data, config.model
    rng = np.random.default_rng(0)
    ranges = {"understanding": (40, 300), "text": (50, 1000), "generation": (8, 64)}
    fixed = {"understanding": model.vision.num_patches, "text": 0, "generation": model.gen_vision.num_tokens}
    kinds = [kind for kind, share in zip(KINDS, data.ratio, strict=True) for _ in range(share)]
    chosen: list[tuple[str, int]] = []
    packed: list[list[int]] = []
    for _ in range(_TRIES * rows):
        kind = str(rng.choice(kinds))
        low, high = (min(bound, data.context // 5) for bound in ranges[kind])
        tried = [*chosen, (kind, int(rng.integers(low, high + 1)))]
        lengths = [text + fixed[kind] for kind, text in tried]
        found = pack(lengths, [kind == "understanding" for kind, _ in tried], rows, data.context, data.images_per_row)
        if found is not None:
            chosen, packed = tried, found
    return chosen, packed


def make_sample(config: Any, kind: str, text: int, rng: np.random.Generator) -> Any:
    """A sample of `kind` with `text` random tokens and a random image; what the step reads of it is its length."""
    from train.data.samples import Sample

    model = config.model
    patches, size = model.vision.num_patches, model.vision.image_size
    ids = rng.integers(1, model.language.vocab_size, text + 1).astype(np.int32)
    if kind == "generation":
        codes = rng.integers(0, model.gen_vision.codebook_size, model.gen_vision.num_tokens).astype(np.int32)
        return Sample(kind, ids, np.zeros(len(ids), bool), codes=codes)
    if kind == "text":
        return Sample(kind, ids, np.ones(len(ids), bool))
    # The image stands after a quarter of the text, and the second half of the text is the answer.
    ids = np.insert(ids, text // 4, np.zeros(patches, np.int32))
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Sample(kind, ids, np.arange(len(ids)) > patches + text // 2, images=(image,))


class _Samples(list):
    """Samples as a prepared folder has them for the trainer."""

    def stored(self, indices: Sequence[int]) -> None:
        """None: nothing of them is in a store."""


def make_assembler(config: Any, lengths: Sequence[tuple[str, int]], rows: Sequence[Sequence[int]]) -> Any:
    """The trainer's `Assembler` over samples that are made as they are asked for, new ones in every step."""
    from janus_jax.processing.images import ImageSettings
    from train.data.batches import Assembler
    from train.data.mixture import Item, Plan

    def plan(step: int) -> Plan:
        rng = np.random.default_rng((1, step))
        samples = _Samples(make_sample(config, kind, text, rng) for kind, text in lengths)
        items = [Item(s.kind, samples, i, s.length, len(s.images)) for i, s in enumerate(samples)]
        return Plan([[items[i] for i in row] for row in rows], 1, 0)

    mixture = types.SimpleNamespace(plan=plan, data=config.data, ratio={"understanding": 1})
    return Assembler(mixture, ImageSettings(config.model.vision.image_size), pad_id=0, placeholder_id=0)


# ---------------------------------------------------------------- steps


def measure(args: argparse.Namespace, kind: str, remat: str, chunk: int) -> common.Run:
    """Compiles the step and times it, in this process."""
    import jax
    import jax.numpy as jnp

    from janus_jax.sharding import make_mesh
    from train.plan.flops import peak_flops, step_flops
    from train.step.state import abstract_state, batch_sharding
    from train.step.step import make_train_step

    mesh = make_mesh()
    devices = mesh.size
    config = make_config(args, kind, remat, chunk)
    lengths, rows = draw_lengths(config, args.rows * devices)
    if kind == "padded":
        rows = [[i] for i in range(len(lengths))]
        rows += [[]] * (-len(rows) % devices)
    config = dataclasses.replace(config, batch_size=len(rows))
    assembler = make_assembler(config, lengths, rows)

    def put(step: int) -> tuple[Any, dict[str, Any]]:
        batch, report = assembler(step)
        return jax.block_until_ready(jax.device_put(batch, batch_sharding(mesh))), report

    def fill(leaf: Any) -> Any:
        return jax.device_put(_device.random_array(leaf.shape, leaf.dtype), leaf.sharding)

    def zeros(leaf: Any) -> Any:
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

    state, frozen = abstract_state(config, mesh)
    trained, frozen = jax.tree.map(fill, (state.trained, frozen))
    step, opt_state, skipped = jax.tree.map(zeros, (state.step, state.opt_state, state.skipped))
    state = dataclasses.replace(state, step=step, trained=trained, opt_state=opt_state, skipped=skipped)
    seconds = []
    with jax.set_mesh(mesh):
        batch, report = put(0)
        began = time.perf_counter()
        step = make_train_step(config, mesh, assembler.settings)
        program = step.lower(state, frozen, batch).compile()
        compiled = time.perf_counter() - began
        # A program compiled ahead refuses int4 arrays for their layout (jax 0.10 to 0.12); this compiles it again.
        call = step if kind == "lora-int4" else program
        for number in range(args.steps + 1):
            batch, report = put(number)
            took, (state, metrics) = _device.timed(call, state, frozen, batch)
            seconds += [took] if number else []
            if report["problems"] or not float(metrics["finite"]):
                raise ValueError(f"step {number} of {kind} rows did not train: {report['problems'] or 'not finite'}")
    drawn, targets = (float(metrics[f"tokens{which}"]) for which in ("_generation", ""))
    flops = step_flops(config, report["tokens"], report["images"], targets - drawn, drawn, report["sample_length"])
    peak, memory = peak_flops(jax.devices()[0].device_kind), program.memory_analysis()
    return {
        "step": seconds,
        "rate": [report["tokens"] / s / devices for s in seconds],
        "flops": [flops / s / devices / 1e12 for s in seconds],
        "mfu": [100 * flops / s / devices / peak for s in seconds] if peak else [],
        "fill": 100 * report["tokens"] / (len(rows) * args.context),
        "rows": len(rows) / devices,
        "samples": report["samples"],
        "compile": compiled,
        "arguments": memory.argument_size_in_bytes / 2**30,
        "temporaries": memory.temp_size_in_bytes / 2**30,
        "dtype": config.compute_dtype,
    }


def table(runs: common.Runs) -> common.Table:
    """A row for each setting; the last column is its tokens/s against the padded rows'."""
    good = common.done(runs)
    rows = [("rows", "remat", "loss_chunk", *_COLUMNS.values(), "tokens/s x padded")]
    padded = next((own for variant, own in good.items() if variant.startswith("padded")), [])
    for variant, own in good.items():
        cells = [common.median(own, key) for key in _COLUMNS]
        rows.append((*variant.split(), *map(common.cell, (*cells, common.ratio(own, padded, "rate")))))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table; 1 where a variant failed."""
    print_any_text()
    arguments = sys.argv[1:] if argv is None else argv
    parser = common.make_parser("training", __doc__)
    parser.add_argument("--layers", type=common.count, help="of decoder and SigLIP (default: all)")
    parser.add_argument("--rows", type=common.count, default=1, help="packed rows a device (default 1)")
    parser.add_argument("--context", type=common.count, default=2048, help="tokens a row (default 2048)")
    parser.add_argument("--steps", type=common.count, default=3, help="timed in each process (default 3)")
    args = parser.parse_args(arguments)
    model, chunk = PRESETS[args.preset], min(512, args.context)
    least = model.vision.num_patches + model.gen_vision.num_tokens
    if args.context % 8 or args.context % chunk or args.context < least:
        parser.error(f"--context {args.context} is not a multiple of 512 (of 8 below that), or under {least}")
    if args.json:
        kind, remat, chunk = args.json.split()
        return _device.answer(measure(args, kind, remat, int(chunk)))
    variants = common.chosen(parser, args, variants_of(args.context))
    runs = common.run_rounds("training", arguments, variants, args.rounds)
    samples = {str(run["samples"]) for own in common.done(runs).values() for run in own}
    layers = f"{args.layers} layers of decoder and SigLIP at most" if args.layers else "all layers"
    about = (
        f"{args.preset}, {layers}, stage 3, {common.dtype_of(runs)} with float32 parameters and AdamW; "
        f"{' or '.join(samples)} samples a step in rows of {args.context}; median of {args.rounds} rounds of "
        f"{args.steps} steps."
    )
    return common.publish("training", "Training steps", about, table(runs), runs, arguments, args.record)


if __name__ == "__main__":
    sys.exit(main())
