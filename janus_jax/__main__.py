"""Command line: `python -m janus_jax generate | chat | serve | info`."""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from PIL import Image

from janus_jax import compilation_cache
from janus_jax.hub import hub_id, resolve
from janus_jax.io.messages import one_line, print_any_text, print_error
from janus_jax.io.stores import as_path
from janus_jax.io.whole.files import write_file
from janus_jax.io.whole.folders import new_folder
from janus_jax.loading import load
from janus_jax.pipeline import JanusPipeline
from janus_jax.processing.chat import Processor
from janus_jax.processing.images import contact_sheet, open_image
from janus_jax.processing.roles import ROLES
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.sampling.sampler import Options
from janus_jax.sampling.speculative import Speculate, check_speculate
from janus_jax.sharding import MESH_AXES, flatten
from janus_jax.weights.adapters.peft_files import read_adapter
from janus_jax.weights.checkpoint import open_checkpoint
from janus_jax.weights.quantize import FORMS
from janus_jax.weights.torch_weights import DTYPES, abstract_params

_API_KEY = "JANUS_JAX_API_KEY"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns 0 on success, 2 for bad input (with one line on standard error), 130 if interrupted."""
    print_any_text()
    args = _parser().parse_args(argv)
    compilation_cache.enable()
    try:
        args.run(args)
    except (OSError, ValueError, OutOfMemory) as error:
        print_error(error)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if not OutOfMemory.says(error):
            raise
        print_error("the model and this request do not fit in the device's memory; try --dtype or --mesh")
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m janus_jax", description="Janus and Janus-Pro in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="draw images for prompts, as PNG files and one contact sheet")
    _add_model(generate)
    generate.add_argument("--prompt", action="append", required=True, help="what to draw; may be given several times")
    generate.add_argument("--n", type=int, default=1, help="images per prompt (default 1)")
    generate.add_argument("--out", required=True, metavar="DIR", help="folder for the files")
    generate.add_argument(
        "--guidance", dest="cfg_weight", type=float, default=5.0, help="classifier-free; 1 for none (default 5)"
    )
    generate.add_argument("--batch-size", type=int, help="images at a time (default: as many as fit in memory)")
    _add_speculate(generate)
    _add_sampling(generate, temperature=1.0)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="ask a question, optionally about images; the answer is streamed")
    _add_model(chat)
    chat.add_argument("question")
    chat.add_argument("--image", action="append", default=[], help="an image file; may be given several times")
    chat.add_argument("--max-new-tokens", type=int, default=512, help="the most tokens of the answer (default 512)")
    chat.add_argument("--system", help="system prompt (default: the reference's; empty for none)")
    _add_sampling(chat, temperature=0.0)
    chat.set_defaults(run=_chat)

    serve = commands.add_parser("serve", help="answer and draw for many at once, by OpenAI's HTTP API")
    _add_weights(serve)
    serve.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="also serve an adapter")
    serve.add_argument("--name", action="append", help="model name for clients; may be given several times")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s: only from here)")
    serve.add_argument("--port", type=int, default=8000, help="default %(default)s")
    serve.add_argument("--slots", type=int, default=16, help="answers at a time; an image takes two (default 16)")
    serve.add_argument("--context", type=int, help="most tokens of a prompt and its answer (default: up to 4096)")
    serve.add_argument("--max-queue", type=int, default=256, help="how many may wait (default %(default)s)")
    _add_speculate(serve)
    serve.add_argument("--api-key", help=f"what clients must send (default: the environment's {_API_KEY}, if set)")
    serve.add_argument("--allow-image-host", action="append", default=[], metavar="HOST", help="fetch images from here")
    serve.add_argument("--grace", type=float, default=30, help="seconds to finish in at SIGTERM (default %(default)g)")
    serve.set_defaults(run=_serve)

    info = commands.add_parser("info", help="sizes, parameter counts by part, and memory in each dtype")
    info.add_argument("--model", required=True, help="checkpoint folder or hub id")
    info.add_argument("--adapter", metavar="DIR", help="also describe a low-rank adapter in PEFT's files")
    info.set_defaults(run=_info)
    return parser


def _add_model(parser: argparse.ArgumentParser):
    _add_weights(parser)
    parser.add_argument("--adapter", metavar="DIR", help="a low-rank adapter in PEFT's files")


def _add_weights(parser: argparse.ArgumentParser):
    parser.add_argument("--model", required=True, help="checkpoint folder (any layout) or hub id")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, float32 on CPU")
    parser.add_argument("--weights", choices=FORMS, help="quantized weights in the decoder (default: as --dtype)")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=f"device mesh over {', '.join(MESH_AXES)}")
    parser.add_argument("--roles", help="chat roles of the prompt, pro or old (default: detected)")


def _add_sampling(parser: argparse.ArgumentParser, temperature: float):
    for field in dataclasses.fields(Options):
        if field.metadata:
            default = temperature if field.name == "temperature" else field.default
            parser.add_argument("--" + field.name.replace("_", "-"), default=default, **field.metadata)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The command's settings for `Options`, checked before minutes of loading."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Options) if field.name in args}
    Options(**given)
    return given


def _add_speculate(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--speculate",
        type=_speculate,
        default="auto",
        help="codes of an image a pass is given, most of them guesses: a number, off, or auto (default); same images",
    )


def _speculate(text: str) -> Speculate:
    """The option --speculate, whose largest value is known only with the model."""
    if text == "off":
        return False
    try:
        return check_speculate(int(text) if text.lstrip("+-").isdigit() else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto, off or a number of codes from 2, got {text!r}") from None


def mesh_of(text: str | None) -> dict[str, int] | None:
    """Sizes of a mesh's axes from the option --mesh."""
    if text is None:
        return None
    try:
        return {axis.strip(): int(size) for axis, size in (item.split("=") for item in text.split(","))}
    except ValueError:
        raise ValueError(f"--mesh must look like fsdp=4,tensor=2, got {text!r}") from None


def _load(args: argparse.Namespace, ahead: Callable[[JanusPipeline], Any] | None = None) -> JanusPipeline:
    mesh = mesh_of(args.mesh)
    ahead = ahead if mesh is None else None
    given = {name: getattr(args, name) for name in ("dtype", "weights", "roles")}
    if isinstance(args.adapter, str):
        given["adapter"] = args.adapter
    return load(args.model, mesh=mesh, ahead=ahead, **given)


def _generate(args: argparse.Namespace):
    how = {"n": args.n, "batch_size": args.batch_size, "speculate": args.speculate} | _sampling(args)
    out = as_path(args.out)
    with new_folder(out):
        janus = _load(args, ahead=lambda janus: janus.compile_images(args.prompt, **how))
        images = janus.generate_images(args.prompt, **how)
        for index, image in enumerate(images):
            prompt, number = divmod(index, args.n)
            _write_png(image, out / f"{prompt:03d}_{number:03d}.png")
        sheet = contact_sheet(images, columns=args.n if len(args.prompt) > 1 else None)
        _write_png(sheet, out / "sheet.png")
    _say_roles(janus)


def _write_png(image: Image.Image, path: pathlib.Path):
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    write_file(path, encoded.getvalue())
    print(path)


def _chat(args: argparse.Namespace):
    how = {"max_new_tokens": args.max_new_tokens} | _sampling(args)
    images = [open_image(path) for path in args.image]
    if args.system is not None:
        how["system_prompt"] = args.system
    janus = _load(args, ahead=lambda janus: janus.compile_chat(args.question, images, **how))
    pieces = janus.stream_chat(args.question, images, **how)
    # The first piece begins with the space after the template's colon.
    first = next(pieces, "").lstrip()
    _say_roles(janus)
    print(first, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:  # also before an error message
        print(flush=True)


def _serve(args: argparse.Namespace):
    try:
        from janus_jax.serving.api import command
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}; pip install 'janus_jax[serve]'") from None
    adapters = dict(_named(adapter) for adapter in args.adapter)
    names = args.name or [args.model.replace("\\", "/").rstrip("/").rpartition("/")[2]]
    if len({*names, *adapters}) < len(names) + len(args.adapter):
        raise ValueError("--name and --adapter: each name may be given once")
    listening = command.listen(args.host, args.port)
    with listening:
        janus = _load(args)
        for name, folder in adapters.items():
            janus.load_adapter(folder, name=name)
        janus.use_adapter(None)
        how = {name: getattr(args, name) for name in ("slots", "context", "max_queue", "speculate", "grace")}
        key = args.api_key or os.environ.get(_API_KEY)
        command.serve(janus, listening, names, api_key=key, hosts=args.allow_image_host, **how)


def _named(adapter: str) -> tuple[str, str]:
    name, equals, folder = adapter.partition("=")
    if not (name and equals and folder):
        raise ValueError(f"--adapter must look like NAME=DIR, got {one_line(adapter)}")
    return name, folder


def _say_roles(janus: JanusPipeline):
    # Only once the request is known to be valid, since bad input gets only one line.
    if janus.processor is not None:
        print(f"roles: {_roles(janus.processor)}", file=sys.stderr, flush=True)


def _roles(processor: Processor) -> str:
    return f"{' and '.join(ROLES[processor.roles])} ({processor.roles}: {processor.roles_from})"


def _info(args: argparse.Namespace):
    folder = resolve(args.model)
    checkpoint = open_checkpoint(folder, quantized=True)
    config = checkpoint.config
    v, g, t = config.vision, config.gen_vision, config.language
    weights = f", {checkpoint.weights} weights" if checkpoint.weights else ""
    print(f"{args.model}: {checkpoint.kind} layout, {config.dtype}{weights}")
    if (folder / "tokenizer.json").exists():
        print(f"  roles: {_roles(Processor.from_folder(folder, config, hub_id=hub_id(args.model)))}")
    details = {
        "vision_model": f"{v.layers} blocks, width {v.width}, {v.heads} heads, images {v.image_size}, "
        f"patch size {v.patch_size}",
        "gen_vision_model": f"images {g.image_size}, {g.grid} x {g.grid} codes of {g.codebook_size} x {g.codebook_dim}",
        "language_model": f"{t.layers} layers, width {t.width}, MLP {t.mlp_dim}, {t.heads} heads, "
        f"{t.kv_heads} key/value heads, vocabulary {t.vocab_size}, positions {t.max_positions}",
    }
    counts: dict[str, int] = {}
    for path, leaf in flatten(abstract_params(config)).items():
        part = path.split("/")[0]
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    for part, count in counts.items():
        print(f"  {part:17} {count:>14,}  {details.get(part, '')}".rstrip())
    total = sum(counts.values())
    print(f"  {'total':17} {total:>14,}")
    if args.adapter is not None:
        adapter = read_adapter(args.adapter, config)
        kind = "DoRA" if adapter.dora else "rsLoRA" if adapter.rslora else "LoRA"
        ranks = sorted({delta.rank for delta in adapter.deltas.values()})
        about = f"{kind} of rank {', '.join(map(str, ranks))} on {len(adapter.deltas)} layers"
        print(f"  {'adapter':17} {adapter.num_parameters:>14,}  {about}")
    for dtype in DTYPES:
        print(f"  in {dtype:14} {total * jax.numpy.dtype(dtype).itemsize / 2**30:>13.2f}  GiB")


if __name__ == "__main__":
    sys.exit(main())
