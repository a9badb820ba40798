"""The steps that all active rows take together: given to the device, and later told to the jobs.

The device may be given the next step before what the last one drew is read. How far answers go is known without
reading, a token a step; images with guesses go on by as many codes as turn out right, which the device alone knows
until a step is read.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from janus_jax.sampling.finite import NotFinite
from janus_jax.serving import programs
from janus_jax.serving.device import Device
from janus_jax.serving.jobs import Ended, Failed, Job, Token
from janus_jax.serving.slots import Slots

Deliver = Callable[[programs.Drawn], None]


@dataclasses.dataclass
class Counts:
    """What the engine has done since it started: tokens, steps, and jobs by how they ended."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    drawn_tokens: int = 0
    steps: int = 0
    ended: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class Steps:
    """Steps of the active rows of `slots`; `end` is called with a job and its last event."""

    def __init__(self, device: Device, slots: Slots, counts: Counts, end: Callable[[Job, Ended | Failed], None]):
        self._device, self._slots, self._counts, self._end = device, slots, counts, end
        self._unread = 0  # steps with guesses that were not delivered

    @property
    def must_be_read(self) -> bool:
        """Whether what was dispatched must be read first: rows are to be sent of which the device alone knows some."""
        return self._slots.changed and self._unread > 0

    def forget(self):
        """What was dispatched will not be delivered."""
        self._unread = 0

    def dispatch(self) -> Iterator[tuple[programs.Drawn, Deliver]]:
        """One step for each adapter that any active row uses: what it will have drawn, and what to do with it then."""
        active = self._slots.active.copy()
        adapters = [None if job is None else job.adapter for job in self._slots.jobs]
        for adapter in dict.fromkeys(adapters[row] for row in np.flatnonzero(active)):
            own = active & np.array([other == adapter for other in adapters])
            images = own & self._slots.rows.image
            window = self._device.window if images.any() else 1
            guessed = images & (window > 1)
            self._device.make_room(self._reach(window))
            seats = [(job, job.rows) for job in self._slots.busy if own[job.rows[0]]]
            drawn = self._device.step(adapter, self._slots, own, window)
            self._slots.advance((own & ~guessed).astype(np.int32))
            self._unread += int(guessed.any())
            self._counts.steps += 1
            for x in jax.tree.leaves(drawn):
                x.copy_to_host_async()
            yield drawn, lambda drawn, seats=seats, guessed=guessed: self._deliver(drawn, seats, guessed)

    def _reach(self, window: int) -> int:
        """Slots that a step may write to: it writes behind the length of every row, whether it is one of its own."""
        longest = int(self._slots.rows.lengths.max()) + self._device.window * self._unread
        # An image ends within the largest size, whatever the steps bring that were not read.
        return min(longest + window, self._device.sizes[-1])

    def _deliver(self, drawn: programs.Drawn, seats: list[tuple[Job, tuple[int, ...]]], guessed: np.ndarray):
        counts = drawn.counts * guessed
        counts[[row for job, rows in seats if job.over for row in rows]] = 0
        self._slots.advance(counts)
        self._unread -= int(guessed.any())
        for job, (row, *_) in seats:
            each = zip(drawn.tokens[row], drawn.logprobs[row], drawn.finite[row], strict=True)
            for token, logprob, finite in itertools.islice(each, int(drawn.counts[row])):
                self._tell(job, int(token), float(logprob), bool(finite))

    def _tell(self, job: Job, token: int, logprob: float, finite: bool):
        if job.over:
            return
        if not finite:
            unit, what = ("image", "code") if job.image else ("conversation", "token")
            where = f"after {what} {len(job.tokens) - 1}" if job.tokens else "after the prompt"
            self._end(job, Failed(NotFinite(unit, [0], f"the logits are not finite {where}")))
        elif token == job.end_id:
            self._end(job, Ended("stop"))
        else:
            job.tell(Token(token, logprob))
            self._counts.drawn_tokens += 1
            if len(job.tokens) == job.limit:
                self._end(job, Ended("stop" if job.image else "length"))
