"""A judge behind any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import Any

from evals.asking.store import Lines
from evals.items import Attempt, JudgeRequest, Task
from evals.posting import NoReply, address, post
from evals.progress import Progress
from janus_jax.io.messages import one_line, print_note

_TRIES = 5
_AT_A_TIME = 8
_SILENT = 16  # requests without a reply, one after the other, after which no more are sent


class Judge:
    """An endpoint and a model there.

    Args:
      url: of the API, such as https://host/v1; `/chat/completions` is added unless it is there.
      model: the name that the endpoint knows.
      key: for the header Authorization; default the environment's JUDGE_API_KEY, or OPENAI_API_KEY.
      timeout: seconds for one request.
      wait: seconds before the second try; each next one waits twice as long.
    Raises: ValueError for a URL that is none.
    """

    def __init__(self, url: str, model: str, key: str | None = None, timeout: float = 120, wait: float = 1):
        parts = address(url)
        if parts is None:
            raise ValueError(f"--judge must be a URL such as http://localhost:8000/v1, got {one_line(url)}")
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        self.url = urllib.parse.urlunsplit(parts._replace(path=path))
        self.model = model
        self._key = key or os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY")
        self._timeout, self._wait = timeout, wait

    def ask(self, attempt: Attempt) -> str:
        """The judge's reply. Raises: NoReply with the reason, after several tries where trying again can help."""
        body = {
            "model": self.model,
            "messages": attempt.messages,
            "temperature": attempt.temperature,
            "max_tokens": attempt.max_tokens,
        }
        given = self.url, body, _content
        return post(*given, key=self._key, timeout=self._timeout, wait=self._wait, tries=_TRIES)


def _content(raw: bytes) -> str:
    """The text of a chat completion; ValueError if it is none."""
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        raise ValueError("the reply is not a chat completion") from None
    return content if isinstance(content, str) else ""


def judgements(
    task: Task,
    requests: Sequence[JudgeRequest],
    judge: Judge,
    path: pathlib.Path,
    header: Mapping[str, Any],
    progress: bool | None,
) -> tuple[dict[str, Any], list[str]]:
    """Judgements by request id, and the ids of those that the judge has not given; they are asked for the next time.

    What it gives is kept in `path` as it comes, with what it was asked, so that nothing is asked twice.
    """
    if not requests:
        return {}, []
    found: dict[str, Any] = {}
    unjudged: list[str] = []
    with Lines(path, header, "choose another --out, or remove that file") as lines:
        left = []
        for request in requests:
            line = lines.known.get(request.id)
            if line is not None and line.get("asked") == _hash(request):
                found[request.id] = line["judgement"]
            else:
                left.append(request)
        with Progress(f"{task.name}: judging", len(requests), len(found), progress) as bar:
            for request, told in said_of(left, lambda request: _judged(task, request, judge), task.name, judge):
                if told:
                    found[request.id] = told[0]
                    lines.append([{"id": request.id, "asked": _hash(request), "judgement": told[0]}])
                else:
                    unjudged.append(request.id)
                bar.add(1)
    order = {request.id: number for number, request in enumerate(requests)}
    return found, sorted(unjudged, key=order.__getitem__)


def said_of(todo: Sequence[Any], say: Callable[[Any], Any], name: str, judge: Judge) -> Iterator[tuple[Any, list[Any]]]:
    """Each of `todo` with [what `say` has said of it], as they come; [] where `say` raised NoReply.

    Some are asked at a time. After many without any reply no more are asked. Why there was none is told in the end, of
    the benchmark `name`.
    """
    reasons: collections.Counter[str] = collections.Counter()
    silent = 0  # since the last reply
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        running = {threads.submit(say, each): each for each in todo}
        try:
            for done in as_completed(running):
                said: list[Any] = []
                try:
                    said = [done.result()]
                    silent = 0
                except NoReply as error:
                    reasons[str(error)] += 1
                    silent += 1
                    for other in running if silent == _SILENT else ():
                        other.cancel()
                except CancelledError:
                    pass
                yield running[done], said
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    for reason, count in reasons.most_common(3):
        print_note(f"{name}: {count} unjudged, the judge {one_line(judge.url)} said: {reason}")


def _judged(task: Task, request: JudgeRequest, judge: Judge) -> Any:
    for attempt in request.attempts:
        judgement = task.parse_judgement(request, judge.ask(attempt))
        if judgement is not None:
            return judgement
    return request.fallback


def _hash(request: JudgeRequest) -> str:
    asked = [[attempt.messages, attempt.temperature] for attempt in request.attempts]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
