"""Jobs and asyncio: a job's events as they come, clients that go away, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from janus_jax.serving.api.errors import ApiError, as_api_error
from janus_jax.serving.engine import Engine
from janus_jax.serving.jobs import Ended, Event, Failed, Job

Result = TypeVar("Result")
_KEEP_ALIVE = 15.0  # seconds without an event after which a comment is sent


class Running:
    """Jobs under way, as a context: `events` are theirs as they come, and what is left at the end is canceled."""

    def __init__(self, engine: Engine, jobs: list[Job]):
        self.engine, self.jobs = engine, jobs
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def __aenter__(self) -> Running:
        loop = asyncio.get_running_loop()

        def listener(index: int):
            def notify(event: Event):
                # The loop is closed if the server gave up on a request.
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return notify

        for index, job in enumerate(self.jobs):
            job.notify = listener(index)
        self.engine.submit(*self.jobs)
        return self

    async def __aexit__(self, *_):
        self.engine.cancel(*(job for job in self.jobs if not job.over))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(index of the job, event), until all jobs are over; raises the error of one that failed."""
        left = len(self.jobs)
        while left:
            index, event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            left -= isinstance(event, Ended)
            yield index, event


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is canceled if the client goes away."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ApiError(499, "the client closed the connection")
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _gone(request: Request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sse(data: Any, event: str | None = None) -> str:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


async def streamed(events: AsyncIterator[str], error_event: str | None = None) -> StreamingResponse:
    """A response of server-sent events, which begins with the first: an error before it has a status of its own."""
    first = await anext(events)

    async def body() -> AsyncIterator[str]:
        yield first
        coming = asyncio.ensure_future(anext(events))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=_KEEP_ALIVE)
                if not done:
                    yield ": keep-alive\n\n"
                    continue
                try:
                    yield coming.result()
                except StopAsyncIteration:
                    return
                except Exception as error:
                    yield sse({"type": "error"} | as_api_error(error).body if error_event else as_api_error(error).body)
                    return
                coming = asyncio.ensure_future(anext(events))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            await events.aclose()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
