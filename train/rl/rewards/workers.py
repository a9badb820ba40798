"""A reward in a process of its own, which is started again when it dies or does not answer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from train.children import outlive_the_notice
from train.rl.config import RewardConfig
from train.rl.rewards.functions import Judged, Metadata, Reward, RewardFailed, call, name_of, reward_of

_CLOSED = "it has been closed"
_STARTS_WITHIN = 3600  # seconds; a model may have to be downloaded


class Here:
    """A reward in this process; it is called in whatever thread asks."""

    def __init__(self, config: RewardConfig, rollouts: str):
        """ValueError in one line if there is no such reward."""
        self._reward = reward_of(config, rollouts)

    def ready(self) -> None:
        """It is since it was made."""

    def __call__(self, judged: Judged, prompts: Sequence[str], metadata: Metadata) -> np.ndarray:
        """See `call`."""
        return call(self._reward, judged, prompts, metadata)

    def close(self) -> None:
        """Leaves nothing behind: a call that is not over ends by itself."""


class Worker:
    """A reward in a process of its own, which starts at once; used by one thread, and closed by any."""

    def __init__(self, config: RewardConfig, rollouts: str):
        self._config, self._rollouts = config, rollouts
        self._lock = threading.Lock()  # over which process there is
        self._closed = self._ready = False
        self._process: Any = None
        self._connection: Connection | None = None
        self._start()

    @property
    def pid(self) -> int | None:
        """Of its process; None if there is none at the moment."""
        return self._process.pid if self._process is not None else None

    def ready(self) -> None:
        """Waits until it can be called. ValueError in one line if there is no such reward."""
        try:
            self._wait_until_ready()
        except RewardFailed as error:
            raise ValueError(f"reward {name_of(self._config)}: {error}") from None

    def __call__(self, judged: Judged, prompts: Sequence[str], metadata: Metadata) -> np.ndarray:
        """See `call`. RewardFailed also if the process ends or does not answer in time; the next call has another."""
        self._start()
        try:
            self._wait_until_ready()
        except ValueError as error:
            raise RewardFailed(str(error)) from None
        kind, told = self._exchange((judged, list(prompts), list(metadata)), self._config.timeout)
        if kind == "failed":
            raise RewardFailed(told)
        return told

    def close(self) -> None:
        """Ends the process."""
        self._closed = True
        self._end()

    # ---------------------------------------------------------------- the process

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise RewardFailed(_CLOSED)
            if self._process is not None and self._process.is_alive():
                return
        self._end()
        # Not forked: the threads of JAX would be lost on the way.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._config, self._rollouts, theirs), daemon=True)
        process.start()
        theirs.close()
        with self._lock:
            self._process, self._connection, self._ready = process, ours, False
        if self._closed:
            self._end()

    def _wait_until_ready(self) -> None:
        if not self._ready:
            kind, told = self._exchange(None, _STARTS_WITHIN)
            if kind == "unusable":
                self._end()
                raise ValueError(told)
            self._ready = True

    def _exchange(self, message: Any, within: float) -> tuple[str, Any]:
        """What the process says to `message`, or without one first of all."""
        connection, process = self._connection, self._process
        if connection is None or process is None:
            raise RewardFailed(_CLOSED)
        try:
            if message is not None:
                connection.send(message)
            if connection.poll(within):
                return connection.recv()
            reason = f"its process has not answered in {within:g} seconds"
        except (EOFError, OSError):
            process.join(1)
            code = process.exitcode
            how = "" if code is None else f" by signal {-code}" if code < 0 else f" with exit code {code}"
            reason = f"its process has ended{how}"
        self._end()
        raise RewardFailed(_CLOSED if self._closed else reason)

    def _end(self) -> None:
        with self._lock:
            process, connection = self._process, self._connection
            self._process = self._connection = None
        if process is not None:
            process.kill()
            process.join()
            process.close()
        if connection is not None:
            connection.close()


def _serve(config: RewardConfig, rollouts: str, connection: Connection) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    outlive_the_notice()
    # The devices are the run's.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")
    try:
        reward: Reward = reward_of(config, rollouts)
    except ValueError as error:
        connection.send(("unusable", str(error)))
        return
    connection.send(("ready", None))
    while True:
        try:
            judged, prompts, metadata = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("scored", call(reward, judged, prompts, metadata)))
        except RewardFailed as error:
            connection.send(("failed", str(error)))
