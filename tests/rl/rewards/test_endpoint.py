"""Scores by an endpoint: what is posted, what comes back, and what is said when nothing does."""

from __future__ import annotations

import base64
import http.server
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from train.rl.config import RewardConfig
from train.rl.rewards import Rewards
from train.rl.rewards.endpoint import Endpoint

PROMPTS, METADATA = ["a cat", "ünï 🙂", "x", ""], [{"a": [1]}, {}, {}, {}]


class Server:
    """Answers by `reply(body, number of the request)`: a status and a body."""

    def __init__(self):
        self.bodies, self.keys = [], []
        self.reply = lambda body, number: (200, {"scores": [len(prompt) for prompt in body["prompts"]]})
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.keys.append(self.headers["Authorization"])
                status, content = outer.reply(body, len(outer.bodies))
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
        self.url = f"http://localhost:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_what_is_posted(server, pictures, monkeypatch):
    monkeypatch.setenv("REWARD_API_KEY", "secret")
    found = Endpoint(server.url, wait=0)(pictures, PROMPTS, METADATA)
    np.testing.assert_array_equal(found, [5, 5, 1, 0])
    (body,) = server.bodies
    assert body["prompts"] == PROMPTS and body["metadata"] == METADATA and server.keys == ["Bearer secret"]
    for text, picture in zip(body["images"], pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))), picture)


def test_answers_are_posted_as_texts(server):
    config = RewardConfig("train.rl.rewards.endpoint:Endpoint", options=(f"url={server.url}",), workers=0)
    answers = ["7", "ünï 🙂", "", "no"]
    with Rewards([config], "answers") as rewards:
        found = rewards.result(rewards.start(answers, PROMPTS, METADATA))
    np.testing.assert_array_equal(found.total, [5, 5, 1, 0])
    assert server.bodies == [{"answers": answers, "prompts": PROMPTS, "metadata": METADATA}]


@pytest.mark.parametrize("bad", [(500, b"oops"), (429, {}), (200, b"no json"), (200, {"scores": [1]}), (200, [])])
def test_what_may_pass_is_tried_again(server, pictures, bad):
    server.reply = lambda body, number: bad if number < 3 else (200, {"scores": [1, 2, 3, 4]})
    np.testing.assert_array_equal(Endpoint(server.url, wait=0)(pictures, PROMPTS, METADATA), [1, 2, 3, 4])
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("reply", "said", "times"),
    [
        ((401, {"error": "bad\nkey"}), r'HTTP 401: {"error": "bad\\nkey"}', 1),
        ((200, {"scores": [1, 2]}), "the reply has 2 scores for 4 pictures", 3),
        ((200, {"scores": ["good"] * 4}), r'the reply is not {"scores": \[numbers\]}', 3),
    ],
)
def test_what_does_not_pass(server, pictures, reply, said, times):
    server.reply = lambda body, number: reply
    with pytest.raises(OSError, match=f"^{server.url}: {said}") as error:
        Endpoint(server.url, wait=0, tries=3)(pictures, PROMPTS, METADATA)
    assert len(server.bodies) == times and "\n" not in str(error.value)


def test_in_a_run(server, pictures, capsys):
    """A null is a picture without a score, and is asked for again alone; options come as text."""
    server.reply = lambda body, number: (200, {"scores": [len(p) or None for p in body["prompts"]]})
    options = (f"url={server.url}", "wait=0", "tries=1")
    with Rewards([RewardConfig("train.rl.rewards.endpoint:Endpoint", options=options, workers=0, tries=2)]) as rewards:
        found = rewards.result(rewards.start(pictures, PROMPTS, METADATA))
        np.testing.assert_array_equal(found.total, [5, 5, 1, np.nan])
        assert [len(body["images"]) for body in server.bodies] == [4, 1]
        server.reply = lambda body, number: (503, b"busy")
        found = rewards.result(rewards.start(pictures, PROMPTS, METADATA))
    assert found.failed == 4 and found.retried == 1
    assert capsys.readouterr().err.splitlines() == [
        "reward Endpoint: 1 of 4 pictures have no score after 2 tries: it gave nan for 1 of 1 pictures",
        f"reward Endpoint: 4 of 4 pictures have no score after 2 tries: {server.url}: HTTP 503: busy",
    ]


def test_nobody_answers(pictures):
    with pytest.raises(OSError, match=r"^http://localhost:9/x: .*refused"):
        Endpoint("http://localhost:9/x", wait=0, tries=2)(pictures, PROMPTS, METADATA)
    with pytest.raises(ValueError, match="url must be an address such as http://localhost:8000/score, got localhost:8"):
        Endpoint("localhost:8")
    with pytest.raises(ValueError, match="tries at least 1"):
        Endpoint("http://localhost", tries=0)
