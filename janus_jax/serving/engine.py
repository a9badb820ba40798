"""Continuous batching: many answers and images under way in one cache, whose rows begin and end at any step.

One thread owns the model. In each turn of its loop it seats jobs that wait, prefills some of their prompts, gives the
device a step of all rows whose prompts are complete, and reads what the step before has drawn: the host works while the
device does. What a job draws depends on its own prompt and options alone.
"""

from __future__ import annotations

import collections
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from janus_jax.io.messages import one_line
from janus_jax.pipeline import JanusPipeline
from janus_jax.sampling import batches
from janus_jax.sampling.finite import NotFinite, on_host
from janus_jax.sampling.images import decode_images, encode_codes
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.sampling.sampler import check_count
from janus_jax.sampling.speculative import Speculate, shared_window
from janus_jax.serving.device import CONTEXT, Device
from janus_jax.serving.jobs import PIECES, Ended, Failed, Job
from janus_jax.serving.slots import Slots
from janus_jax.serving.steps import Counts, Steps

_LEAST_PROMPT = 32  # tokens that a context has room for beside an image's
_FILLED_IN_A_TURN = 128  # tokens of prompts: a step for each small piece would take longer than the pieces


class Full(Exception):
    """As many jobs wait as may."""


class Stopped(Exception):
    """The engine takes no more jobs, or ended before this one was done."""


class Engine:
    """Answers and draws for many at once; `submit` takes jobs from any thread.

    Args:
      janus: the pipeline; its adapters are served too. Nobody else should change its parameters.
      slots: rows of the cache: an answer takes one, an image two (with guidance).
      context: the most tokens of a prompt and what is drawn; default the model's positions, at most 4096.
      max_queue: how many jobs may wait for rows.
      speculate: codes of an image that a step is given, as in `JanusPipeline.generate_images`: the same images, sooner.
        Answers are drawn token by token; those under way beside images wait for longer steps.
    Raises: ValueError for sizes that are not possible, or do not fit in the device's memory.
    """

    def __init__(
        self,
        janus: JanusPipeline,
        slots: int = 16,
        context: int | None = None,
        max_queue: int = 256,
        speculate: Speculate = "auto",
    ):
        c = janus.config
        positions = c.language.max_positions
        context = min(positions, CONTEXT) if context is None else check_count("context", context)
        least = c.gen_vision.num_tokens + _LEAST_PROMPT
        if not least <= context <= positions:
            raise ValueError(f"context must be from {least}, for an image, to the model's {positions}, got {context}")
        if check_count("slots", slots) < 2:
            raise ValueError("slots must be at least 2, which one image takes")
        self.janus, self.context, self.max_queue = janus, context, check_count("max_queue", max_queue)
        self.counts = Counts()
        self._slots = Slots(slots)
        with batches.using(janus.mesh):
            window = shared_window(speculate, c.gen_vision.num_tokens, slots)
        self._device = Device(janus, slots, context, window)
        self._steps = Steps(self._device, self._slots, self.counts, self._end)
        self._waiting: collections.deque[Job] = collections.deque()
        self._errands: collections.deque[tuple[Callable[[], Any], Callable[[Any], None], Future]] = collections.deque()
        self._filling: tuple[Job, Iterator[int]] | None = None
        self._pending: collections.deque[tuple[Any, Callable[[Any], None], Future | None]] = collections.deque()
        self._changed = threading.Condition()
        self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ from any thread

    def submit(self, *jobs: Job):
        """Takes jobs, all or none.

        Raises: ValueError for a job that does not fit the context or names an adapter that is not loaded; Full if too
        many wait; Stopped.
        """
        for job in jobs:
            if job.adapter not in self._device.params:
                raise ValueError(f"there is no adapter named {one_line(job.adapter)}")
            if (length := job.prompt_tokens) + job.limit > self.context:
                raise ValueError(
                    f"the prompt of {length} tokens and {job.limit} new tokens exceed the context of {self.context}"
                )
        with self._changed:
            if self._stopping:
                raise Stopped("the server is stopping")
            if len(self._waiting) + len(jobs) > self.max_queue:
                raise Full(f"{len(self._waiting)} requests are waiting")
            for job in jobs:
                job.submitted = time.monotonic()
                self._waiting.append(job)
            self._changed.notify()

    def cancel(self, *jobs: Job):
        """Ends jobs that nobody waits for any more; their rows are free a step later."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def decode(self, codes: np.ndarray) -> Future[np.ndarray]:
        """The uint8 picture [h, w, 3] of codes [num_tokens], made between steps."""

        def dispatch() -> Any:
            return decode_images(self.janus.model, self._device.params[None], batches.put(codes[None], None))

        return self._errand(dispatch, _checked_picture)

    def encode(self, pixels: np.ndarray) -> Future[np.ndarray]:
        """The codes [num_tokens] of a picture [h, w, 3] in [-1, 1]."""

        def dispatch() -> Any:
            return encode_codes(self.janus.model, self._device.params[None], batches.put(pixels[None], None))

        return self._errand(dispatch, lambda codes: codes[0])

    @property
    def running(self) -> int:
        """The jobs that have rows."""
        return len(self._slots.busy)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, and all rows are free."""
        return not (self._waiting or self._slots.busy or self._errands or self._pending)

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive()

    def close(self, patience: float = 0.0):
        """Takes no more jobs, waits up to `patience` seconds for those under way, and fails the others with Stopped."""
        with self._changed:
            self._stopping = True
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and self.healthy and not self.idle:
            time.sleep(0.02)
        with self._changed:
            self._ended = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_):
        self.close()

    def _errand(self, dispatch: Callable[[], Any], finish: Callable[[Any], Any]) -> Future:
        future: Future = Future()

        def deliver(arrays: Any):
            try:
                future.set_result(finish(arrays))
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            if self._ended:
                raise Stopped("the server is stopping")
            self._errands.append((dispatch, deliver, future))
            self._changed.notify()
        return future

    def warm_up(self):
        """Compiles every program, by running it; call it before the first job."""

        def everything() -> Any:
            self._slots.forget()
            return self._device.warm_up()

        self._errand(everything, lambda _: None).result()

    # ------------------------------------------------------------ the engine's thread

    def _run(self):
        try:
            while self._wait():
                try:
                    with batches.using(self.janus.mesh):
                        self._turn()
                except Exception as error:
                    self._recover(error)
        finally:  # also if not even a new cache can be made
            self._stopping = self._ended = True
            self._fail_all(Stopped("the server stopped before this was done"))

    def _wait(self) -> bool:
        """Waits until there is something to do; False at the end."""
        with self._changed:
            while not self._ended and self.idle:
                self._changed.wait()
            return not self._ended

    def _turn(self):
        self._drop_cancelled()
        while self._errands:
            self._run_errand(*self._errands.popleft())
        self._fill_some()
        while self._steps.must_be_read:
            self._read()
        before = len(self._pending)
        for drawn, deliver in self._steps.dispatch():
            self._pending.append((drawn, deliver, None))
        for _ in range(before):  # what was dispatched just now is read in the next turn
            self._read()

    def _run_errand(self, dispatch: Callable[[], Any], deliver: Callable[[Any], None], future: Future):
        try:
            self._pending.append((dispatch(), deliver, future))
        except Exception as error:
            future.set_exception(_told(error))
            if self._device.is_lost:
                raise

    def _drop_cancelled(self):
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled]
            for job in gone:
                self._waiting.remove(job)
        for job in [*gone, *(job for job in self._slots.busy if job.cancelled)]:
            self._end(job, Ended("cancelled"))

    # ---------------------------------------- prompts

    def _fill_some(self):
        """Goes on with prompts: a few tokens or one piece in a turn, but as many as it takes until a row is active."""
        filled = 0
        while filled < _FILLED_IN_A_TURN or not self._slots.active.any():
            if self._filling is None:
                self._filling = self._next()
            if self._filling is None:
                return
            job, pieces = self._filling
            try:
                count = None if job.over else next(pieces, None)
            except Exception as error:
                count = None
                self._end(job, Failed(_told(error)))
                if self._device.is_lost:
                    raise
            if count is None:
                self._filling = None
            else:
                filled += count

    def _next(self) -> tuple[Job, Iterator[int]] | None:
        with self._changed:
            if not self._waiting or len(self._slots.free) < len(self._waiting[0].prompts):
                return None
            job = self._waiting.popleft()
        job.seated = time.monotonic()
        return job, self._fill(job)

    def _fill(self, job: Job) -> Iterator[int]:
        """Prefills the job's prompts, piece by piece; yields the tokens of each."""
        need, smallest = job.prompt_tokens + PIECES[0], self._device.sizes[0]
        if not self._slots.busy and need <= smallest < self._device.slots:
            held = max(self._slots.held(prompt, job.adapter)[1] for prompt in job.prompts)
            if held < PIECES[0]:  # a smaller cache is faster, and what it holds is of no use now
                self._device.renew()
                self._slots.forget()
        self._device.make_room(need)
        filled = 0
        for prompt, row, source, common in self._slots.seat(job):
            self._device.copy(source, row, common)
            job.reused += common
            for slot, piece, count in prompt.pieces(common, self._device.slots):
                if filled:
                    yield filled
                self._device.prefill(job.adapter, piece, row, slot)
                self._slots.fill(row, prompt, slot + count)
                filled = count
        self.counts.prompt_tokens += job.prompt_tokens
        self.counts.reused_tokens += job.reused
        self._slots.begin(job)  # in the turn of its last piece
        yield filled

    # ---------------------------------------- steps

    def _read(self):
        """Reads what the device was given first of all, and delivers it."""
        arrays, deliver, _ = self._pending[0]
        deliver(jax.tree.map(on_host, arrays))
        self._pending.popleft()

    def _end(self, job: Job, event: Ended | Failed):
        spoiled = isinstance(event, Failed)
        if job.rows:
            if spoiled:
                for picture in (picture for prompt in job.prompts for picture in prompt.pictures):
                    self._device.features.forget(job.adapter, picture)
            self._slots.leave(job, keep=not spoiled)
        self.counts.ended["failed" if isinstance(event, Failed) else event.reason] += 1
        job.tell(event)

    # ---------------------------------------- failures

    def _recover(self, error: Exception):
        """After an error that is not of one job: those under way fail, and the others go on with a new cache."""
        if not OutOfMemory.says(error):
            traceback.print_exception(error)
        self._fail(self._slots.busy, _told(error))
        self._device.renew()
        self._slots.forget()

    def _fail(self, jobs: list[Job], error: Exception):
        """Fails `jobs`, and whatever the device was given."""
        self._filling = None
        for job in jobs:
            self._end(job, Failed(error))
        for *_, future in self._pending:
            if future is not None:
                future.set_exception(error)
        self._pending.clear()
        self._steps.forget()

    def _fail_all(self, error: Exception):
        self._fail([*self._slots.busy, *self._waiting], error)
        self._waiting.clear()
        while self._errands:
            self._errands.popleft()[-1].set_exception(error)


def _checked_picture(made: Any) -> np.ndarray:
    images, finite = made
    if not finite[0]:
        raise NotFinite("image", [0], "the VQ decoder's pixels are not finite")
    return images[0]


def _told(error: Exception) -> Exception:
    """`error` as a job is told it."""
    if OutOfMemory.says(error):
        return OutOfMemory("this does not fit in the device's memory; try less at a time")
    return error
