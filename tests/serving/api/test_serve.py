"""The command: a process that serves, is stopped, and says what is wrong."""

# ruff: noqa: F811  (fixtures are imported)

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from janus_jax.__main__ import main
from tests.library.tiny_janus import QUESTION, folder, janus  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[3]


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
    from tests.serving.api.mixed import ANSWERED, DRAWN, LEFT, NOT_SERVED, REFUSED, Mixed, ask_all, openai

    serving.wait()
    mixed = Mixed(janus, "tiny")

    def stop(futures: list) -> int:
        while sum(future.done() for future in futures) < 60:
            time.sleep(0.01)
        return serving.stop()

    with openai.OpenAI(base_url=f"http://127.0.0.1:{serving.port}/v1", api_key="none", max_retries=0) as client:
        kinds, outcomes, code = ask_all(mixed, client, stop)
    assert code == 0, "".join(serving.lines)
    assert all(outcome in (kind, NOT_SERVED) for kind, outcome in zip(kinds, outcomes, strict=True))
    assert {ANSWERED, DRAWN, LEFT, REFUSED, NOT_SERVED} == set(outcomes)
    assert QUESTION not in "".join(serving.lines), "prompts are not logged"
    # Those under way were finished: each client had one, and those that came later were not let in.
    assert sum(outcome != NOT_SERVED for outcome in outcomes) >= 60
