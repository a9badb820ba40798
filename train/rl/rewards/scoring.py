"""Several rewards, with weights, for pictures or answers that come while others are judged."""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from janus_jax.io.messages import print_line
from train.rl.config import RewardConfig
from train.rl.rewards.functions import Judged, Metadata, RewardFailed, check_config, name_of
from train.rl.rewards.workers import Here, Worker


@dataclasses.dataclass(frozen=True)
class Scores:
    """What rewards say of N pictures or answers.

    Attributes:
      total: float64 [N], the weighted sum; NaN for those that some reward has not scored.
      columns: by reward, in the order of the config, float64 [N].
      retried: calls that were made again.
      failed: how many have no total.
    """

    total: np.ndarray
    columns: Mapping[str, np.ndarray]
    retried: int
    failed: int


@dataclasses.dataclass(frozen=True)
class _Scored:
    """A reward's numbers for what a call judged, NaN where there is none, and why."""

    values: np.ndarray
    retried: int
    problem: str


@dataclasses.dataclass(frozen=True)
class Handle:
    """Pictures or answers that are being judged; for `Rewards.result`."""

    count: int
    parts: tuple[tuple[Future, ...], ...] = dataclasses.field(repr=False)


class Rewards:
    """The rewards of a run, in worker processes or threads of this process; each process of a run has its own.

    Pictures, or answers, are judged in the order in which they were given. Use it in a `with`, or `close` it.
    """

    def __init__(self, configs: Sequence[RewardConfig], rollouts: str = "pictures"):
        """Starts everything that is called, for what `rollouts` says, one of `ROLLOUTS`.

        Raises: ValueError in one line for a reward that is not there, or judges something else.
        """
        self._rollouts = rollouts
        names = [name_of(config) for config in configs]
        if not names:
            raise ValueError("rewards are empty; name at least one")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rewards are called {name}; give one of them another name")
        for config in configs:
            check_config(config)
        self._parts: list[_Part] = []
        try:
            for config in configs:
                self._parts.append(_Part(config, rollouts))
            for part in self._parts:
                part.ready()
        except BaseException:
            self.close()
            raise

    def start(self, judged: Judged, prompts: Sequence[str], metadata: Metadata) -> Handle:
        """Has pictures or answers judged, and returns at once.

        Args:
          judged: pictures uint8 [N, h, w, 3], which must not change until they are judged; or N answers.
          prompts, metadata: one for each.
        """
        if self._rollouts == "answers":
            if isinstance(judged, np.ndarray) or not all(isinstance(each, str) for each in judged):
                raise ValueError("answers must be a list of texts")
        elif not isinstance(judged, np.ndarray):
            raise ValueError(f"pictures must be uint8 [N, h, w, 3], got {type(judged).__name__}")
        elif judged.dtype != np.uint8 or judged.ndim != 4 or judged.shape[-1] != 3:
            raise ValueError(f"pictures must be uint8 [N, h, w, 3], got {judged.dtype} {list(judged.shape)}")
        if not len(judged) == len(prompts) == len(metadata):
            raise ValueError(f"{len(judged)} {self._rollouts}, {len(prompts)} prompts, {len(metadata)} metadata")
        return Handle(len(judged), tuple(part.submit(judged, prompts, metadata) for part in self._parts))

    def result(self, handle: Handle) -> Scores:
        """Waits for what `start` began; prints a line for each reason why some have no score.

        Raises: ValueError in one line for a reward that has not scored anything so far.
        """
        columns: dict[str, np.ndarray] = {}
        total, retried = np.zeros(handle.count), 0
        for part, futures in zip(self._parts, handle.parts, strict=True):
            made = [future.result() for future in futures]
            columns[part.name] = values = np.concatenate([np.zeros(0), *(each.values for each in made)])
            part.tell(made)
            retried += sum(each.retried for each in made)
            total += part.config.weight * values
        return Scores(total, columns, retried, int(np.isnan(total).sum()))

    def close(self) -> None:
        """Ends the worker processes; what has not been judged is not judged any more."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Part:
    """One reward, and the threads that call it: one for each worker."""

    def __init__(self, config: RewardConfig, rollouts: str):
        self.config, self.name, self._rollouts = config, name_of(config), rollouts
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._closed, self._scored_any = False, False
        self._callers: list[Worker | Here] = [Worker(config, rollouts) for _ in range(config.workers)]
        if not config.workers:
            self._callers.append(Here(config, rollouts))
        # Not an executor's threads, for which Python waits as it ends, however long a call takes.
        self._threads = [threading.Thread(target=self._work, args=(caller,), daemon=True) for caller in self._callers]

    def ready(self) -> None:
        for caller in self._callers:
            caller.ready()
        for thread in self._threads:
            thread.start()

    def submit(self, judged: Judged, prompts: Sequence[str], metadata: Metadata) -> tuple[Future, ...]:
        """Calls for everything, in order."""
        futures: list[Future] = []
        for begin in range(0, len(judged), self.config.batch_size):
            some = slice(begin, begin + self.config.batch_size)
            futures.append(Future())
            self._tasks.put((futures[-1], judged[some], prompts[some], metadata[some]))
        return tuple(futures)

    def tell(self, made: Sequence[_Scored]) -> None:
        """Prints why some have no score."""
        lost: collections.Counter[str] = collections.Counter()
        for each in made:
            lost[each.problem] += int(np.isnan(each.values).sum())
        self._scored_any = self._scored_any or any(np.isfinite(each.values).any() for each in made)
        count = sum(len(each.values) for each in made)
        for problem, number in lost.items():
            if number and not self._scored_any:
                raise ValueError(f"reward {self.name} has not scored any {self._rollouts[:-1]}: {problem}")
            if number:
                tries = f"{self.config.tries} {'try' if self.config.tries == 1 else 'tries'}"
                what = self._rollouts
                print_line(f"reward {self.name}: {number} of {count} {what} have no score after {tries}: {problem}")

    def close(self) -> None:
        self._closed = True
        for caller in self._callers:
            caller.close()
            self._tasks.put(None)

    def _work(self, caller: Worker | Here) -> None:
        while (task := self._tasks.get()) is not None:
            future, *given = task
            try:
                if self._closed:
                    raise RuntimeError("the rewards have been closed")
                future.set_result(self._score(caller, *given))
            except BaseException as error:  # for whoever waits for it
                future.set_exception(error)

    def _score(self, caller: Worker | Here, judged: Judged, prompts: Sequence[str], metadata: Metadata) -> _Scored:
        values = np.full(len(judged), np.nan)
        left = np.arange(len(values))
        problem, calls = "", 0
        while len(left) and calls < self.config.tries and not self._closed:
            calls += 1
            try:
                rows = left.tolist()
                some = judged[left] if isinstance(judged, np.ndarray) else [judged[i] for i in rows]
                given = caller(some, [prompts[i] for i in rows], [metadata[i] for i in rows])
            except RewardFailed as error:
                problem = str(error)
                continue
            good = np.isfinite(given)
            values[left[good]] = given[good]
            left = left[~good]
            if len(left):
                problem = f"it gave {given[~good][0]} for {len(left)} of {len(given)} {self._rollouts}"
        return _Scored(values, max(calls - 1, 0), problem)
