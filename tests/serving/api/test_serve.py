"""The command: a process that serves, is stopped, and says what is wrong."""

# ruff: noqa: F811  (fixtures are imported)

import base64
import concurrent.futures
import http.client
import io
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from janus_jax.__main__ import main
from tests.library.tiny_janus import OTHER, QUESTION, SHORT, folder, janus, nearly_equal  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[3]
SETTINGS = {"max_tokens": 20, "temperature": 0.8, "top_p": 0.9}


def refusal(capsys, *args: str) -> str:
    assert main(["serve", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_wrong_is_said_in_one_line(folder, capsys):
    pytest.importorskip("fastapi")
    model = ("--model", str(folder), "--port", "0")
    assert "NAME=DIR" in refusal(capsys, *model, "--adapter", "mine")
    assert "once" in refusal(capsys, *model, "--adapter", "a=x", "--name", "a")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen at 127.0.0.1:{port}" in refusal(capsys, "--model", str(folder), "--port", port)
    assert "from 0 (any) to 65535, got 99999" in refusal(capsys, "--model", str(folder), "--port", "99999")


def test_without_the_extra_it_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("janus_jax.serving.api")]:
        monkeypatch.delitem(sys.modules, name)
    pytest.importorskip("fastapi")
    assert "pip install 'janus_jax[serve]'" in refusal(capsys, "--model", str(folder))


class Served:
    """The command in a process of its own."""

    def __init__(self, folder: pathlib.Path, *args: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "janus_jax", "serve", "--model", str(folder), "--port", str(self.port), *args]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        self.lines = []

    def wait(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("serving"):
                return
        raise AssertionError("".join(self.lines))

    def ask(self, path: str, body: dict) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        _, rest = self.process.communicate(timeout=120)
        self.lines += rest.splitlines(keepends=True)
        return self.process.returncode


@pytest.fixture
def serving(folder):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    server = Served(folder, "--slots", "5", "--grace", "60", "--name", "tiny")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.mark.slow
def test_a_server_that_is_stopped_finishes_what_is_under_way(serving, janus):
    """Right answers, or errors that a client tries again; none mixed up, exit code 0."""
    serving.wait()
    rng, pictures = np.random.default_rng(4), []
    for _ in range(2):
        file, picture = io.BytesIO(), rng.integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(picture).save(file, "PNG")
        pictures.append((picture, "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()))
    said = {
        (seed, which): janus.chat(
            QUESTION, [pictures[which][0]], 20, 0.8, top_p=0.9, seed=seed, system_prompt=""
        )
        for seed in range(3)
        for which in range(2)
    }  # fmt: skip
    drawn = {prompt: janus.generate_images(prompt, 2) for prompt in (SHORT, OTHER)}

    def one(index: int) -> str:
        dice = random.Random(index)
        if dice.random() < 0.1:
            status, answer = serving.ask("/v1/chat/completions", {"model": "tiny", "messages": [], "n": 0})
            assert status == 400 and answer["error"]["message"]
            return "refused"
        if dice.random() < 0.3:
            prompt = dice.choice([SHORT, OTHER])
            status, answer = serving.ask("/v1/images/generations", {"prompt": prompt, "n": 2, "seed": 0})
            assert status == 200
            made = [np.asarray(Image.open(io.BytesIO(base64.b64decode(x["b64_json"])))) for x in answer["data"]]
            assert all(map(nearly_equal, made, drawn[prompt]))
            return "drawn"
        seed, which = dice.randrange(3), dice.randrange(2)
        image = {"type": "image_url", "image_url": {"url": pictures[which][1]}}
        user = {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}
        messages = [{"role": "system", "content": ""}, user]
        status, answer = serving.ask(
            "/v1/chat/completions", {"model": "tiny", "messages": messages, "seed": seed, **SETTINGS}
        )
        assert status == 200 and answer["choices"][0]["message"]["content"] == said[seed, which]
        return "answered"

    def attempt(index: int) -> str:
        try:
            return one(index)
        except (OSError, http.client.HTTPException):
            return "not served"  # which clients try again

    with concurrent.futures.ThreadPoolExecutor(32) as threads:
        futures = [threads.submit(attempt, index) for index in range(200)]
        while sum(future.done() for future in futures) < 60:
            time.sleep(0.01)
        code = serving.stop()
        outcomes = [future.result() for future in futures]
    assert code == 0, "".join(serving.lines)
    assert {"answered", "drawn", "refused", "not served"} == set(outcomes)
    assert QUESTION not in "".join(serving.lines), "prompts are not logged"
    # Those under way were finished: each client had one, and those that came later were not let in.
    assert sum(outcome != "not served" for outcome in outcomes) >= 60
