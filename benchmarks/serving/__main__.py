"""Tokens/s and seconds to the first token of a server with many clients, against one question after the other.

`python -m benchmarks.serving --preset janus_pro_1b` asks questions, half of them about a picture each, of a server over
HTTP, from a process of clients that each wait for their answer before they ask again, and of `janus.chat` in a loop;
both decode greedily, answers have a fixed length, and weights are random, on sizes of a preset with fewer layers. The
loop asks the first questions only, in which every length and pictures are as frequent as in all. The steps alone are
the server's own program with all rows busy in a bare loop, in the same process as its steps for as many questions,
by turns: what a step of the server takes longer is what serving costs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import concurrent.futures
import http.client
import io
import itertools
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

from benchmarks.common import device as _device
from benchmarks.common import runs as common
from benchmarks.evals import make_processor, shortened

SERVED, ALONE, STEPS = "served", "janus.chat", "steps alone"
_ALIKE = 12  # questions after which lengths and pictures repeat
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
    model, params = _device.random_model(config, _device.default_dtype())
    with tempfile.TemporaryDirectory() as folder:
        janus = JanusPipeline(config, params, model, make_processor(config, folder))
    janus.processor.tokenizer.eos_id = -1
    return janus


# ---------------------------------------------------------------- variants


def time_alone(args: argparse.Namespace) -> common.Run:
    """Seconds of the first `args.alone` questions, one after the other."""
    janus, asked = make_janus(args), questions(args)[: args.alone]

    def given(question: tuple[str, bytes | None]) -> tuple[Any, ...]:
        text, picture = question
        return text, [] if picture is None else [picture], args.tokens

    for question in asked:  # prompts are padded to several lengths, each of which is compiled
        for _ in itertools.islice(janus.stream_chat(*given(question)), 3):
            pass
    began, busy = time.perf_counter(), time.process_time()
    for question in asked:
        janus.chat(*given(question))
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    tokens = len(asked) * args.tokens
    return {"seconds a token": seconds / tokens, "processor": busy / tokens}


def time_served(args: argparse.Namespace) -> common.Run:
    """Seconds of all questions to a server in this process, by clients in another, and of its steps."""
    import uvicorn

    from janus_jax.serving.api.app import make_app
    from janus_jax.serving.api.command import listen
    from janus_jax.serving.api.served import Served
    from janus_jax.serving.engine import Engine

    with Engine(make_janus(args), args.slots, args.context) as engine:
        engine.warm_up()
        alone = _bare_steps(engine, args)
        full = _full_steps(engine, args) + _full_steps(engine, args)
        alone += _bare_steps(engine, args)
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
        server.should_exit = True
        thread.join()
    run = json.loads(told.splitlines()[-1])
    tokens = args.questions * args.tokens
    return run | {"processor": busy / tokens, "rows": tokens / steps, "step": full, STEPS: alone}


def _full_steps(engine: Any, args: argparse.Namespace) -> list[float]:
    """Seconds of the engine's steps while every row answers a question."""
    from janus_jax.serving.jobs import Token

    told: list[float] = []
    over: queue.SimpleQueue[float] = queue.SimpleQueue()

    def end(event: Any):
        if not isinstance(event, Token):
            over.put(time.perf_counter())

    def note(event: Any):
        if isinstance(event, Token):
            told.append(time.perf_counter())
        end(event)

    jobs = _short(engine.janus, args)
    for job in jobs:
        job.notify = end
    jobs[-1].notify = note  # the last to be seated: all rows are busy from then until the first one ends
    engine.submit(*jobs)
    ends = [over.get() for _ in jobs]
    return np.diff([when for when in told if when < min(ends)]).tolist()


def _bare_steps(engine: Any, args: argparse.Namespace) -> list[float]:
    """Seconds of the engine's step in a loop with nothing else, with every row busy; the rows are free afterwards."""
    import jax

    from janus_jax.serving.slots import Slots

    def steps() -> Any:
        slots, active, device = Slots(args.slots), np.ones(args.slots, bool), engine._device
        for row, job in enumerate(_short(engine.janus, args)):
            slots.seat(job)
            slots.fill(row, job.prompts[0], job.prompt_tokens - 1)
        ends, before = [], None
        for _ in range(args.steps):
            drawn = device.step(None, slots, active)
            slots.rows = slots.rows.advanced(active.astype(np.int32))
            jax.block_until_ready(before)  # as the engine does: a step is under way while the one before is read
            ends.append(time.perf_counter())
            before = drawn
        jax.block_until_ready(before)
        engine._slots.forget()
        device.renew()
        return np.diff(ends[2:])

    return engine._errand(steps, np.ndarray.tolist).result()


def _short(janus: Any, args: argparse.Namespace) -> list[Any]:
    """A question for each row, with answers of `args.steps` tokens."""
    from janus_jax.serving.jobs import question

    return [question(janus, f"{row}: go on", max_new_tokens=args.steps) for row in range(args.slots)]


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
    return {"seconds a token": (time.perf_counter() - began) / (len(asked) * args.tokens), "first": firsts}


# ---------------------------------------------------------------- the command


def table(runs: common.Runs) -> common.Table:
    """A row for each variant; ratios are medians over the rounds."""
    good = common.done(runs)
    alone, served = good.get(ALONE, []), good.get(SERVED, [])
    heads = (
        "",
        "tokens/s",
        f"x {ALONE}",
        "x, processor",
        "first token, s",
        "95%",
        "rows a step",
        "ms a step",
        f"x {STEPS}",
    )
    rows: common.Table = [heads]
    for variant, own in good.items():
        firsts = [first for run in own for first in run.get("first", [])]
        cells = [
            1 / common.median(own, "seconds a token"),
            *(common.ratio(alone, own, key) for key in ("seconds a token", "processor")),
            statistics.median(firsts) if firsts else None,
            float(np.quantile(firsts, 0.95)) if firsts else None,
            common.median(own, "rows"),
            1000 * common.median(own, "step"),
            statistics.median(common.median([run], "step") / common.median([run], STEPS) for run in own)
            if variant == SERVED
            else None,
        ]
        rows.append((variant, *map(common.cell, cells)))
    if served:
        rows.append((STEPS, *[""] * 6, common.cell(1000 * common.median(served, STEPS)), "1"))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table of all variants; 1 where a variant failed."""
    from janus_jax.io.messages import print_any_text  # late: JAX comes with it

    print_any_text()
    arguments = sys.argv[1:] if argv is None else argv
    parser = common.make_parser("serving", __doc__, rounds=1)
    parser.add_argument("--layers", type=common.count, default=4, help="of SigLIP and decoder (default %(default)s)")
    parser.add_argument("--clients", type=common.count, default=16, help="(default %(default)s)")
    parser.add_argument("--slots", type=common.count, default=16, help="rows of the server (default %(default)s)")
    parser.add_argument("--context", type=common.count, default=1024, help="tokens of a row (default %(default)s)")
    parser.add_argument("--questions", type=common.count, default=48, help="of the clients (default %(default)s)")
    parser.add_argument(
        "--alone", type=common.count, default=_ALIKE, help="of these, to ask one after the other (default %(default)s)"
    )
    parser.add_argument("--tokens", type=common.count, default=128, help="of an answer (default %(default)s)")
    parser.add_argument("--steps", type=common.count, default=96, help="whose time is taken (default %(default)s)")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.alone > args.questions:
        parser.error(f"--alone must be at most --questions, {args.questions}")
    if args.steps <= 4 * args.slots:
        parser.error(f"--steps must be above 4 * --slots, {4 * args.slots}: rows are filled one after the other")
    if args.json:
        todo = {SERVED: time_served, ALONE: time_alone, _CLIENTS: ask_from_many}
        return _device.answer(todo[args.json](args), "torch" if args.json == _CLIENTS else "jax")
    variants = common.chosen(parser, args, (SERVED, ALONE))
    runs = common.run_rounds("serving", arguments, variants, args.rounds)
    about = (
        f"{args.preset} with {args.layers} layers in SigLIP and decoder, {args.questions} questions, {args.alone} of "
        f"them to {ALONE}, half with a picture, answers of {args.tokens} tokens, {args.clients} clients, {args.slots} "
        f"slots of {args.context}; median of {args.rounds} rounds, ratios are medians over the rounds."
    )
    return common.publish("serving", "Serving", about, table(runs), runs, arguments, args.record)


if __name__ == "__main__":
    sys.exit(main())
