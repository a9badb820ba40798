"""Hostile inputs, each tried within bounds of time and memory: the harness of the fuzz tests.

A target is a function of a module of tests, `target(data: bytes, folder: pathlib.Path)`, which hands `data` to the
library, usually as a file that it writes into `folder`, new and empty for each input:

    from tests.fuzz.bounded import given, mutated

    def read_image(data, folder):
        (folder / "a.png").write_bytes(data)
        open_image(folder / "a.png")

    @given(mutated([PNG, JPEG]))
    def test_images(bounded, data):
        bounded(read_image, data)

`bounded` (a fixture of tests/fuzz/conftest.py) runs targets in a process of its own, so that a crash of the
interpreter, a hang and memory without end are findings with an input, too. It fails unless the target returns, or
raises ValueError or OSError with a message of one line, and it gives that message ("" where the target returned).
Expensive set-up belongs into a `functools.cache`d function of the target's module. FUZZ_EXAMPLES says how many inputs
each test tries; without it they are a few, and the same ones in every run.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import os
import pathlib
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
from hypothesis import strategies as st

SECONDS = 5.0  # of CPU for an input
MEBIBYTES = 512  # that an input may add to the resident memory
_PATIENCE = 8  # times SECONDS of wall time: tests run beside one another
_LONGEST_LINE = 4000
_ROOT = pathlib.Path(__file__).parents[2]


class Bounded:
    """Runs targets on inputs in a worker process, which is started anew after it has died."""

    def __init__(self, seconds: float = SECONDS, mebibytes: int = MEBIBYTES):
        self.seconds, self.mebibytes = seconds, mebibytes
        self.inputs, self.refused, self.slowest, self.largest = 0, 0, 0.0, 0.0
        self._worker: subprocess.Popen | None = None

    def __call__(self, target: Callable[[bytes, pathlib.Path], Any], data: bytes) -> str:
        if self._worker is None:
            command = [sys.executable, "-m", "tests.fuzz.bounded", str(self.seconds), str(self.mebibytes)]
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            self._worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT, env=environment, bufsize=0
            )
            self._ask({"target": f"{target.__module__}:{target.__qualname__}", "data": None}, starting=True)
        asked = {"target": f"{target.__module__}:{target.__qualname__}", "data": base64.b64encode(data).decode()}
        answer = self._ask(asked)
        self.inputs += 1
        self.slowest = max(self.slowest, answer["seconds"])
        self.largest = max(self.largest, answer["mebibytes"])
        if answer["trace"]:
            raise AssertionError(answer["trace"])
        self.refused += answer["line"] is not None
        line = answer["line"] or ""
        assert "\n" not in line and len(line) <= _LONGEST_LINE, f"not one line of bounded length: {line[:500]!r}"
        assert answer["mebibytes"] <= self.mebibytes, f"took {answer['mebibytes']:.0f} MiB: {line[:200]!r}"
        assert answer["seconds"] <= self.seconds, f"took {answer['seconds']:.1f} s of CPU: {line[:200]!r}"
        return line

    def _ask(self, question: dict[str, Any], starting: bool = False) -> dict[str, Any]:
        worker = self._worker
        patience = 180 if starting else self.seconds * _PATIENCE
        try:
            text = json.dumps(question).encode() + b"\n"
            while text:
                text = text[worker.stdin.write(text) :]
            ready, _, _ = select.select([worker.stdout], [], [], patience)
            answer = worker.stdout.readline() if ready else None
        except BrokenPipeError:
            answer = b""
        if answer:
            return json.loads(answer)
        self.close(kill=True)
        if answer is None:
            raise AssertionError(f"no answer within {patience:g} seconds: it hangs")
        raise AssertionError(f"the process died ({worker.returncode})")

    def close(self, kill: bool = False):
        if self._worker is not None:
            if kill:
                self._worker.kill()
            self._worker.stdin.close()
            self._worker.wait()
            self._worker.stdout.close()
            self._worker = None


# ---------------------------------------------------------------- the worker


class _TooLong(BaseException):
    """Not an Exception, lest the library take it for bad input."""


def _work(seconds: float, mebibytes: int):
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no answer

    def stop(*_):
        raise _TooLong

    signal.signal(signal.SIGALRM, stop)
    parent = pathlib.Path(tempfile.mkdtemp())
    try:
        for number, line in enumerate(sys.stdin.buffer):
            question = json.loads(line)
            module, name = question["target"].split(":")
            target = getattr(importlib.import_module(module), name)
            if question["data"] is None:
                answer = {}
                # Beyond the bound, so that a finding is measured, and the machine survives it.
                limit = _size("VmSize") + 8 * mebibytes * 2**20
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            else:
                folder = parent / str(number)
                folder.mkdir()
                answer = _try(target, base64.b64decode(question["data"]), folder, seconds)
                shutil.rmtree(folder, ignore_errors=True)
            answers.write(json.dumps(answer).encode() + b"\n")
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _try(target: Callable, data: bytes, folder: pathlib.Path, seconds: float) -> dict[str, Any]:
    line = trace = None
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, start = _size("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, seconds * (_PATIENCE - 1))
    try:
        target(data, folder)
    except (ValueError, OSError) as error:
        line = str(error)
    except _TooLong:
        trace = "it hangs:\n" + traceback.format_exc()
    except BaseException:
        trace = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    used = {"seconds": time.process_time() - start, "mebibytes": max(_size("VmHWM") - before, 0) / 2**20}
    return {"line": line, "trace": trace and trace[-4000:], **used}


def _size(name: str) -> int:
    """Bytes, by /proc/self/status."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# ---------------------------------------------------------------- inputs


_TELLING = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f"]
_TELLING += [b"-1", b"1e999", b"NaN", b"null", b"[" * 64, b"9" * 64, b'"', b"{", b"}", b"\n", b"\x1b[31m", b"../"]
_TELLING += [b"\xed\xa0\x80", b"\x00\x00\x00\x80"]


def given(*strategies: st.SearchStrategy, **named: st.SearchStrategy) -> Callable[[Callable], Callable]:
    """hypothesis's `given` with as many inputs as FUZZ_EXAMPLES says."""
    examples = os.environ.get("FUZZ_EXAMPLES")
    profile = hypothesis.settings(
        max_examples=int(examples or 80),
        derandomize=not examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda test: profile(hypothesis.given(*strategies, **named)(test))


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes], edits: int = 6) -> bytes:
    """One of `seeds` after some edits: bytes changed, cut out, repeated or inserted, the end cut off, seeds joined."""
    data = draw(st.sampled_from(list(seeds)))
    for _ in range(draw(st.integers(0, edits))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.integers(1, 16) | st.integers(1, max(len(data), 1)))
        kind = draw(st.integers(0, 6))
        if kind == 0:
            data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at + 1 :]
        elif kind == 1:
            telling = draw(st.sampled_from(_TELLING))
            data = data[:at] + telling + data[at + draw(st.sampled_from([0, len(telling)])) :]
        elif kind == 2:
            data = data[:at] + data[end:]
        elif kind == 3:
            data = data[:end] + data[at:end] * draw(st.integers(1, 3)) + data[end:]
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            other = draw(st.sampled_from(list(seeds)))
            data = data[:at] + other[draw(st.integers(0, len(other))) :]
        elif at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    return data


if __name__ == "__main__":
    _work(float(sys.argv[1]), int(sys.argv[2]))
