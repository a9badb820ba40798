"""A judge behind an endpoint on loopback: asked, kept, silent, and asked again."""

from __future__ import annotations

import collections
import http.server
import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from evals import judging, main
from evals.asking.identity import prompts_identity
from evals.asking.store import Lines
from evals.judging import Judge, NoReply, judgements
from evals.tasks import TASKS
from tests.evals.asking.toy import Toy, write_data


class Endpoint:
    """Answers each request by `reply(body, how many times it has come)`: a status and a body."""

    def __init__(self):
        self.seen: collections.Counter[str] = collections.Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[dict[str, Any], int], tuple[int, Any]] = lambda body, times: (200, completion("good"))
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append({**self.headers, "path": self.path})
                text = text_of(body)
                outer.seen[text] += 1
                status, content = outer.reply(body, outer.seen[text])
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any):
                pass

        self.server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
        self.url = f"http://localhost:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def text_of(body: dict[str, Any]) -> str:
    """What is asked, beside a picture or alone."""
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[1]["text"]


def completion(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def requests(tmp_path):
    """Requests of twenty items, all for the judge."""
    data = write_data(tmp_path / "data")
    rows = json.loads((data / "toy.json").read_text())
    (data / "toy.json").write_text(json.dumps([row | {"answer": "judge"} for row in rows]))
    task = Toy()
    items = task.load(data, "report").items
    return task.judge_requests(items, {item.id: f"reply {item.id}" for item in items}, "report")


def judged(requests, judge: Judge, path: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    return judgements(Toy(), requests, judge, path, {"judge": judge.model}, progress=False)


def test_judgements_are_kept(endpoint, requests, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    endpoint.reply = lambda body, times: (200, completion("bad" if "0-" in body["messages"][0]["content"] else "good"))
    judge, path = Judge(endpoint.url, "some-model", wait=0), tmp_path / "judgements.jsonl"
    found, unjudged = judged(requests, judge, path)
    assert found == {request.id: int("0-" not in request.id) for request in requests} and not unjudged
    assert {body["model"] for body in endpoint.bodies} == {"some-model"}
    assert endpoint.bodies[0]["temperature"] == 0 and endpoint.bodies[0]["max_tokens"] == 3
    assert endpoint.headers[0]["path"] == "/v1/chat/completions"
    assert endpoint.headers[0]["Authorization"] == "Bearer secret" and "secret" not in path.read_text()
    before = len(endpoint.bodies)
    assert judged(requests, judge, path) == (found, [])
    assert len(endpoint.bodies) == before == 20


def test_another_reply_is_judged_anew(endpoint, requests, tmp_path):
    judge, path = Judge(endpoint.url, "m", wait=0), tmp_path / "judgements.jsonl"
    judged(requests[:2], judge, path)
    other = Toy().judge_requests([requests[0].item], {requests[0].id: "something else"}, "report")
    judged([*other, requests[1]], judge, path)
    assert [count for _, count in sorted(endpoint.seen.items())] == [1, 1, 1]


def test_attempts_in_turn_and_then_the_fallback(endpoint, requests, tmp_path):
    """A reply that says nothing is one attempt; after the last one the request's fallback holds."""
    endpoint.reply = lambda body, times: (200, completion("hm" if "0-1" in body["messages"][0]["content"] else "hm "))
    found, unjudged = judged(requests[:2], Judge(endpoint.url, "m", wait=0), tmp_path / "j")
    assert found == {request.id: 0 for request in requests[:2]} and not unjudged
    assert sorted(body["temperature"] for body in endpoint.bodies) == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize("bad", [(500, b"oops"), (429, {}), (200, b"no json"), (200, {"choices": []})])
def test_what_may_pass_is_tried_again(endpoint, requests, tmp_path, bad):
    endpoint.reply = lambda body, times: bad if times < 3 else (200, completion("good"))
    found, unjudged = judged(requests[:3], Judge(endpoint.url, "m", wait=0), tmp_path / "j")
    assert found == {request.id: 1 for request in requests[:3]} and not unjudged
    assert set(endpoint.seen.values()) == {3}


def test_what_will_not_pass_is_not(endpoint, requests, tmp_path, capsys):
    endpoint.reply = lambda body, times: (401, {"error": {"message": "bad\nkey"}})
    found, unjudged = judged(requests[:3], Judge(endpoint.url, "m", wait=0), tmp_path / "j")
    assert found == {} and unjudged == [request.id for request in requests[:3]]
    assert set(endpoint.seen.values()) == {1}
    line = capsys.readouterr().err.strip()
    assert "3 unjudged" in line and "HTTP 401" in line and "\n" not in line


def test_no_endpoint(requests, tmp_path, monkeypatch):
    """After some requests without any reply, no more are sent."""
    monkeypatch.setattr(judging, "_SILENT", 4)
    monkeypatch.setattr(judging, "_AT_A_TIME", 1)
    asked = []
    real = Judge.ask
    monkeypatch.setattr(Judge, "ask", lambda self, attempt: asked.append(attempt) or real(self, attempt))
    found, unjudged = judged(requests, Judge("http://localhost:9", "m", wait=0), tmp_path / "j")
    assert found == {} and unjudged == [request.id for request in requests]
    assert 4 <= len(asked) <= 6
    with pytest.raises(NoReply):
        Judge("http://localhost:9", "m", wait=0).ask(requests[0].attempts[0])


def test_the_command_says_3_until_all_are_judged(endpoint, requests, tmp_path, monkeypatch, capsys):
    """With --rescore, which needs no model."""
    monkeypatch.setitem(TASKS, "toy", Toy())
    monkeypatch.setattr(judging, "_TRIES", 1)
    monkeypatch.setattr(judging, "_SILENT", 100)  # all 20 are asked each time, also where their threads begin late
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    (out / "model.json").write_text('{"model": "a model", "files": "f"}')
    loaded = Toy().load(data, "report")
    header = {"format": 1, "task": "toy", "protocol": "report", "prompts": prompts_identity(loaded), "files": "f"}
    with Lines(out / "toy" / "predictions-report.jsonl", header) as lines:
        lines.append({"id": item.id, "reply": "x"} for item in loaded.items)
    command = ["--rescore", "--tasks", "toy", "--data", str(data), "--out", str(out)]
    command += ["--judge", endpoint.url, "--judge-model", "m"]
    endpoint.reply = lambda body, times: (200, completion("good")) if times > 1 else (403, {})
    assert main.main(command) == 3
    assert "unjudged" in capsys.readouterr().err
    found = json.loads((out / "results.json").read_text())["tasks"]["toy"]["report"]
    assert found["unjudged"] == 20 and found["judge"] == "m" and found["numbers"]["accuracy"]["value"] == 0
    assert "(partial)" in (out / "report.md").read_text()
    assert main.main(command) == 0
    found = json.loads((out / "results.json").read_text())["tasks"]["toy"]["report"]
    assert found["unjudged"] == 0 and found["numbers"]["accuracy"]["value"] == 100
