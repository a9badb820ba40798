"""Tokens/s and seconds to the first token of a server with many clients, against one question after the other.

`python -m benchmarks.serving --preset janus_pro_1b` asks the same questions, half of them about a picture each, of a
server over HTTP, from a process of clients that each wait for their answer before they ask again, and of `janus.chat`
in a loop; both decode greedily, answers have a fixed length, and weights are random, on sizes of a preset with fewer
layers. The steps alone are those of the server's own program with all rows busy, without server and clients: what a
step of the server takes longer is what serving costs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import concurrent.futures
import http.client
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common import device as _device
from benchmarks.common import runs as common
from benchmarks.evals import make_processor, shortened

SERVED, ALONE, STEPS = "served", "janus.chat", "steps alone"
_CLIENTS = "clients"
_NOUNS = ("a dog", "a traffic light", "a dining table", "a wine glass", "a person", "a skateboard")


def questions(args: argparse.Namespace) -> list[tuple[str, bytes | None]]:
    """The questions, of several lengths, and the picture that every second one is about."""
    from PIL import Image

    rng, asked = np.random.default_rng(0), []
    for number in range(args.questions):
        text = f"{number}: is there {' or '.join(_NOUNS[: 1 + number % len(_NOUNS)])}? Describe what you see."
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (384, 384, 3), np.uint8)).save(encoded, "PNG")
        asked.append((text, encoded.getvalue() if number % 2 else None))
    return asked


def make_janus(args: argparse.Namespace) -> Any:
    """A pipeline of random weights whose answers never end by themselves."""
    from janus_jax.pipeline import JanusPipeline

    config = shortened(args)
    model, params = _device.random_model(config, "float32")
    with tempfile.TemporaryDirectory() as folder:
        janus = JanusPipeline(config, params, model, make_processor(config, folder))
    janus.processor.tokenizer.eos_id = -1
    return janus


# ---------------------------------------------------------------- variants


def time_alone(args: argparse.Namespace) -> common.Run:
    """Seconds of all questions, one after the other."""
    janus, asked = make_janus(args), questions(args)

    def ask(some: Sequence[tuple[str, bytes | None]]):
        for text, picture in some:
            janus.chat(text, [] if picture is None else [picture], args.tokens)

    ask(asked)  # prompts are padded to several lengths, each of which is compiled
    began, busy = time.perf_counter(), time.process_time()
    ask(asked)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    return {"seconds": seconds, "processor": busy, "tokens": len(asked) * args.tokens}


def time_served(args: argparse.Namespace) -> common.Run:
    """The same with a server in this process, and clients in another."""
    import uvicorn

    from janus_jax.serving.api.app import make_app
    from janus_jax.serving.api.command import listen
    from janus_jax.serving.api.served import Served
    from janus_jax.serving.engine import Engine

    with Engine(make_janus(args), args.slots, args.context) as engine:
        engine.warm_up()
        listening = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(make_app(Served(engine, {"janus": None})), log_level="warning"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        own = sys.argv[1 : sys.argv.index("--json")]
        command = [sys.executable, "-m", "benchmarks.serving", *own, "--json", _CLIENTS]
        port = ["--port", str(listening.getsockname()[1])]
        busy, steps = time.process_time(), engine.counts.steps
        told = subprocess.run([*command, *port], stdout=subprocess.PIPE, text=True, check=True).stdout
        busy, steps = time.process_time() - busy, engine.counts.steps - steps
        run = json.loads(told.splitlines()[-1]) | {"processor": busy, "steps": steps}
        run["step"] = _full_steps(engine, args)
        server.should_exit = True
        thread.join()
    return run


def _full_steps(engine: Any, args: argparse.Namespace) -> float:
    """Median seconds of the engine's steps while every row answers a question."""
    from janus_jax.serving.jobs import Token, question

    told: list[float] = []
    over = threading.Semaphore(0)

    def note(event: Any):
        if isinstance(event, Token):
            told.append(time.perf_counter())
        else:
            over.release()

    jobs = [question(engine.janus, f"{row}: go on", max_new_tokens=args.steps) for row in range(args.slots)]
    for job in jobs[:-1]:
        job.notify = lambda event: over.release() if not isinstance(event, Token) else None
    jobs[-1].notify = note  # the last to be seated: while it is answered, all rows are busy
    engine.submit(*jobs)
    for _ in jobs:
        over.acquire()
    full = told[: args.steps - args.slots]  # the first ones seated end first
    return statistics.median(np.diff(full))


def time_steps(args: argparse.Namespace) -> common.Run:
    """Median seconds of the server's step with every row busy, given one after the other."""
    import jax

    from janus_jax.serving.device import Device
    from janus_jax.serving.jobs import question
    from janus_jax.serving.slots import Slots

    janus = make_janus(args)
    device, slots, active = Device(janus, args.slots, args.context), Slots(args.slots), np.ones(args.slots, bool)
    for row in range(args.slots):
        job = question(janus, f"{row}: go on", max_new_tokens=args.steps)
        slots.seat(job)
        slots.fill(row, job.prompts[0], job.prompt_tokens - 1)
    seconds = []
    for _ in range(args.steps):
        began = time.perf_counter()
        jax.block_until_ready(device.step(None, slots, active))
        slots.rows = slots.rows.advanced(active)
        seconds.append(time.perf_counter() - began)
    return {"step": statistics.median(seconds[args.steps // 4 :])}


def ask_from_many(args: argparse.Namespace) -> common.Run:
    """Seconds of all questions from `args.clients` clients, and those to each one's first token."""
    asked = questions(args)

    def ask(question: tuple[str, bytes | None]) -> float:
        text, picture = question
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if picture is not None:
            url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        body = {
            "model": "janus", "messages": [{"role": "user", "content": content}],
            "max_tokens": args.tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", args.port, timeout=600)
        began, first, drawn = time.perf_counter(), None, 0
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(answer.read().decode())
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - began
            drawn = (chunk.get("usage") or {}).get("completion_tokens", drawn)
        if drawn != args.tokens:
            raise RuntimeError(f"{drawn} of {args.tokens} tokens came")
        # Random tokens may begin with half a letter, which comes with the next one.
        return time.perf_counter() - began if first is None else first

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(args.clients) as clients:
        firsts = list(clients.map(ask, asked))
    return {"seconds": time.perf_counter() - began, "first": firsts, "tokens": len(asked) * args.tokens}


# ---------------------------------------------------------------- the command


def table(runs: common.Runs) -> common.Table:
    """A row for each variant; ratios are medians over the rounds."""
    good = common.done(runs)
    rows = [("", "tokens/s", f"x {ALONE}", "x, processor", "first token, s", "95%", "ms a step", f"x {STEPS}")]
    for variant, own in good.items():
        rate = [run["tokens"] / run["seconds"] for run in own if "seconds" in run]
        firsts = [first for run in own for first in run.get("first", [])]
        cells = [
            statistics.median(rate) if rate else None,
            *(
                common.ratio(good[ALONE], own, key) if rate and ALONE in good else None
                for key in ("seconds", "processor")
            ),
            statistics.median(firsts) if firsts else None,
            float(np.quantile(firsts, 0.95)) if firsts else None,
            1000 * common.median(own, "step"),
            1 / common.ratio(good[STEPS], own, "step") if "step" in own[0] and STEPS in good else None,
        ]
        rows.append((variant, *map(common.cell, cells)))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table of all variants; 1 where a variant failed."""
    from janus_jax.io.messages import print_any_text  # late: JAX comes with it

    print_any_text()
    arguments = sys.argv[1:] if argv is None else argv
    parser = common.make_parser("serving", __doc__)
    parser.add_argument("--layers", type=common.count, default=4, help="of SigLIP and decoder (default %(default)s)")
    parser.add_argument("--clients", type=common.count, default=16, help="(default %(default)s)")
    parser.add_argument("--slots", type=common.count, default=16, help="rows of the server (default %(default)s)")
    parser.add_argument("--context", type=common.count, default=1024, help="tokens of a row (default %(default)s)")
    parser.add_argument("--questions", type=common.count, default=48, help="(default %(default)s)")
    parser.add_argument("--tokens", type=common.count, default=64, help="of an answer (default %(default)s)")
    parser.add_argument("--steps", type=common.count, default=96, help="whose time is taken (default %(default)s)")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.steps <= args.slots + 1:
        parser.error(f"--steps must be above --slots + 1, {args.slots + 1}")
    if args.json:
        todo = {SERVED: time_served, ALONE: time_alone, STEPS: time_steps, _CLIENTS: ask_from_many}
        return _device.answer(todo[args.json](args), "torch" if args.json == _CLIENTS else "jax")
    variants = common.chosen(parser, args, (SERVED, ALONE, STEPS))
    runs = common.run_rounds("serving", arguments, variants, args.rounds)
    about = (
        f"{args.preset} with {args.layers} layers in SigLIP and decoder, {args.questions} questions, half with a "
        f"picture, answers of {args.tokens} tokens, {args.clients} clients, {args.slots} slots of {args.context}; "
        f"median of {args.rounds} rounds, ratios are medians over the rounds."
    )
    return common.publish("serving", "Serving", about, table(runs), runs, arguments, args.record)


if __name__ == "__main__":
    sys.exit(main())
