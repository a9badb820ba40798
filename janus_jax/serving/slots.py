"""Which rows of the cache are in use, for what, and what their slots hold, on the host."""

from __future__ import annotations

import numpy as np

from janus_jax.serving.jobs import Job, Prompt
from janus_jax.serving.programs import Rows

# Fewer tokens in common are computed again rather than copied.
_WORTH_COPYING = 32


class Slots:
    """The rows of the cache.

    What a row has computed is kept when its job is over: another prompt that begins the same, such as the next turn of
    a conversation or another image of the same prompt, goes on from there.

    Attributes:
      rows: what the step is told of them. Of images that are guessed, lengths, drawn and first are as when a step was
        last read, see `steps`.
      jobs: each row's job, or None if it is free.
      active: [B] bool, the rows whose prompts are complete and which have tokens to draw.
      contents: for each row, what its slots hold from 0 on, see `Prompt.content`.
      changed: whether the host has changed `rows`, so that the device has to be told.
    """

    def __init__(self, count: int):
        self.rows = Rows.idle(count)
        self.jobs: list[Job | None] = [None] * count
        self.active = np.zeros(count, bool)
        self.changed = True
        self.contents = [np.zeros(0, np.int64)] * count
        self._adapters: list[str | None] = [None] * count
        self._used = [0] * count  # when each was last in use, to take the one that was not for longest
        self._clock = 0

    @property
    def free(self) -> list[int]:
        return [row for row, job in enumerate(self.jobs) if job is None]

    @property
    def busy(self) -> list[Job]:
        """The jobs that have rows, each once."""
        return list(dict.fromkeys(job for job in self.jobs if job is not None))

    def seat(self, job: Job) -> list[tuple[Prompt, int, int, int]]:
        """Gives `job` rows, of which there must be enough.

        Returns for each prompt: itself, its row, the row that holds how many of its first tokens.
        """
        seats, taken = [], []
        for prompt in job.prompts:
            source, common = self.held(prompt, job.adapter)
            free = [row for row in self.free if row not in taken]
            whole = 2 * common >= len(self.contents[source])  # else somebody may still come for the rest of it
            oldest = min(free, key=lambda row: (len(self.contents[row]) > 0, self._used[row]))
            row = source if source in free and whole and common >= _WORTH_COPYING else oldest
            common = common if row == source or common >= _WORTH_COPYING else 0
            taken.append(row)
            self.contents[row] = prompt.content[:common]
            self._adapters[row] = job.adapter
            seats.append((prompt, row, source, common))
        job.rows = tuple(taken)
        for prompt, row, _, common in seats:
            self.jobs[row] = job
            self._describe(row, job, prompt)
            self.fill(row, prompt, common)
        return seats

    def held(self, prompt: Prompt, adapter: str | None) -> tuple[int, int]:
        """The row that holds the most of the prompt's first tokens, and how many; the last one is fed by a step."""
        found = [0 if self._adapters[row] != adapter else _common(prompt, x) for row, x in enumerate(self.contents)]
        most = max(found)
        # A free one, if there is any: nothing has to be copied then.
        return min((self.jobs[row] is not None, row) for row, n in enumerate(found) if n == most)[1], most

    def _describe(self, row: int, job: Job, prompt: Prompt):
        rows = self.rows
        rows.drawn[row], rows.first[row], rows.image[row] = 0, prompt.ids[-1], job.image
        rows.conditional[row], rows.unconditional[row] = job.rows[0], job.rows[-1]
        rows.guidance[row], rows.seed[row], rows.index[row] = job.options.cfg_weight, job.options.seed, job.index
        for name, value in job.sampler.items():
            getattr(rows.sampler, name)[row] = value

    def fill(self, row: int, prompt: Prompt, count: int):
        """Notes that `row` holds the first `count` tokens of its prompt."""
        self.contents[row] = prompt.content[:count]
        self.rows.lengths[row] = count
        self.changed = True

    def begin(self, job: Job):
        """The job's prompts are there: it takes part in the steps."""
        self.active[list(job.rows)] = True

    def advance(self, counts: np.ndarray):
        """The device goes on by so many tokens [B] int32 of each row, and has them in its own copy of `rows`."""
        self.rows = self.rows.advanced(counts)
        for job in {self.jobs[row] for row in np.flatnonzero(counts)}:
            job.dispatched += int(counts[job.rows[0]])
            if job.dispatched == job.limit:
                self.active[list(job.rows)] = False

    def leave(self, job: Job, keep: bool):
        """The job's rows are free; `keep`: what they hold is good for others."""
        self._clock += 1
        for prompt, row in zip(job.prompts, job.rows, strict=True):
            self.jobs[row], self.active[row], self._used[row] = None, False, self._clock
            if not keep:
                self.contents[row] = self.contents[row][:0]
            elif not job.image and job.dispatched:
                # The last token that was drawn was not fed, or only by a step behind the end.
                self.contents[row] = np.concatenate([prompt.content, np.array(job.tokens[:-1], np.int64)])
            # Idle rows write behind their length.
            self.rows.lengths[row] = len(self.contents[row])
            self.rows.image[row], self.rows.first[row] = False, -1
            self.rows.conditional[row] = self.rows.unconditional[row] = row
            self.changed = True
        job.rows = ()

    def forget(self):
        """The cache is a new one: nothing is held."""
        self.contents = [x[:0] for x in self.contents]
        self.rows.lengths[:] = 0
        self.changed = True


def _common(prompt: Prompt, held: np.ndarray) -> int:
    """How many of the prompt's first tokens, but its last, a row holds."""
    count = min(len(prompt.ids) - 1, len(held))
    differ = np.flatnonzero(prompt.content[:count] != held[:count])
    return int(differ[0]) if len(differ) else count
