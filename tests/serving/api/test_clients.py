"""Requests as clients send them: OpenAI's own client with its retries, and Open WebUI, by the shapes of its source."""

# ruff: noqa: F811  (fixtures are imported)

import base64
import http.client
import io
import itertools
import json
import re
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from janus_jax import load
from janus_jax.serving.engine import Engine, Stopped
from tests.library.tiny_janus import QUESTION, SHORT, folder, janus, nearly_equal  # noqa: F401
from tests.serving.api.on_loopback import data_url, on_loopback
from tests.weights.adapters.random_adapters import written

openai = pytest.importorskip("openai")
for name in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(name)

from janus_jax.serving.api.app import make_app  # noqa: E402
from janus_jax.serving.api.served import Served  # noqa: E402
from tests.serving.api.tiny_server import port  # noqa: E402, F401

MODEL, LIMIT = "janus-tiny", 10
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(janus):
    with Engine(janus, slots=5, max_queue=40) as engine:
        # Clients with a fixed list of image models find one of its names.
        yield Served(engine, {MODEL: None, "gpt-image-1": None}, api_key="secret")


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret") as client:
        yield client


# ---------------------------------------------------------------- OpenAI's client tries again


def asking(**how):
    return {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": LIMIT} | how


ENDPOINTS = {
    "chat": lambda client: client.chat.completions.create(**asking()).choices[0].message.content,
    "chat stream": lambda client: "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asking(stream=True))
    ),
    "images": lambda client: client.images.generate(prompt=SHORT, extra_body={"seed": 0}).data[0].b64_json,
    "images stream": lambda client: (
        list(client.images.generate(prompt=SHORT, stream=True, extra_body={"seed": 0}))[-1].b64_json
    ),
}


def first_refused(monkeypatch, served, error: Exception, times: int):
    """The engine refuses so many submissions, and then takes them; returns when each was made."""
    submit, made = served.engine.submit, []

    def submitting(*jobs):
        made.append(time.monotonic())
        if len(made) <= times:
            raise error
        submit(*jobs)

    monkeypatch.setattr(served.engine, "submit", submitting)
    return made


@pytest.mark.parametrize("ask", ENDPOINTS.values(), ids=ENDPOINTS.keys())
def test_openai_tries_again_after_503(client, served, monkeypatch, ask):
    expected = ask(client)
    made = first_refused(monkeypatch, served, Stopped("the server is stopping"), 2)
    assert ask(client) == expected
    assert len(made) == 3 and all(later - sooner >= 1 for sooner, later in itertools.pairwise(made))


def test_openai_gives_up_in_the_end(client, served, monkeypatch):
    made = first_refused(monkeypatch, served, RuntimeError("something of the server's own"), 99)
    with pytest.raises(openai.InternalServerError) as raised:
        ENDPOINTS["chat"](client)
    assert len(made) == 3 and "its log says why" in raised.value.body["message"]


def wait_until(true: Callable[[], object]):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def refused(port: int) -> int:
    """How many chat requests met a full queue."""
    text = send(port, "GET", "/metrics")[2].decode()
    found = re.search(r'^janus_requests_total\{route="/v1/chat/completions",status="429"\} (\d+)', text, re.MULTILINE)
    return int(found[1]) if found else 0


def test_openai_waits_for_a_full_queue(client, served, port, monkeypatch):
    """As long as Retry-After says; the queue is truly full, of jobs under way."""
    expected = ENDPOINTS["chat"](client)
    turn, hurry = served.engine._turn, threading.Event()
    # Steps take their time, so that the rows are taken as long as they must be.
    monkeypatch.setattr(served.engine, "_turn", lambda: (hurry.wait(0.1), turn()))
    stream = client.chat.completions.create(**asking(stream=True, max_tokens=400, n=5, temperature=1.0))
    next(stream)
    monkeypatch.setattr(served.engine, "max_queue", 1)
    waiting = threading.Thread(target=ENDPOINTS["chat"], args=(client,))
    waiting.start()
    wait_until(lambda: served.engine.waiting)
    with pytest.raises(openai.RateLimitError) as raised:
        client.with_options(max_retries=0).chat.completions.create(**asking())
    assert int(raised.value.response.headers["retry-after"]) >= 1 and raised.value.body["code"] == "queue_full"

    def room():
        wait_until(lambda: refused(port) >= 2)
        hurry.set()
        stream.close()

    making_room, began = threading.Thread(target=room), time.monotonic()
    making_room.start()
    assert ENDPOINTS["chat"](client) == expected and time.monotonic() - began >= 1
    for thread in (making_room, waiting):
        thread.join(60)


# ---------------------------------------------------------------- adapters


def test_an_adapter_is_a_model_of_its_own(folder, tmp_path):
    """It is listed with the model that it changes, answers and draws; its name is asked for like any other's."""
    own = load(folder)
    own.load_adapter(written(tmp_path / "painter", own.config, seed=1, targets=["q_proj", "up_proj"]), name="painter")
    said, drawn = {}, {}
    for name in (None, "painter"):
        own.use_adapter(name)
        said[name], drawn[name] = own.chat(QUESTION, (), LIMIT), own.generate_images(SHORT, 1)[0]
    assert said[None] != said["painter"], "the adapter does nothing, which proves nothing"
    with (
        Engine(own, slots=4) as engine,
        on_loopback(make_app(Served(engine, {MODEL: None, "painter": "painter"}))) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client,
    ):
        models = {model.id: model for model in client.models.list()}
        assert list(models) == [MODEL, "painter"]
        assert models["painter"].parent == models["painter"].root == MODEL and models[MODEL].parent is None
        for name, adapter in ((MODEL, None), ("painter", "painter")):
            made = client.chat.completions.create(**asking(model=name))
            assert made.choices[0].message.content == said[adapter] and made.model == name
            image = client.images.generate(model=name, prompt=SHORT, extra_body={"seed": 0}).data[0]
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json))))
            assert nearly_equal(picture, drawn[adapter])
        with pytest.raises(openai.NotFoundError, match="did you mean painter"):
            client.chat.completions.create(**asking(model="paintr"))


# ---------------------------------------------------------------- Open WebUI


def send(port: int, method: str, path: str, body: dict | None = None, key: str = "secret"):
    """As its back end does: by aiohttp, with these headers; returns the status, the type, and the bytes."""
    headers = {
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/json",
        "X-OpenWebUI-User-Name": "Somebody",
        "X-OpenWebUI-User-Id": "0b1f",
        "X-OpenWebUI-User-Email": "somebody@example.org",
        "X-OpenWebUI-User-Role": "admin",
        "X-OpenWebUI-Chat-Id": "7c2e",
        "Accept": "*/*",
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, answer.getheader("content-type"), answer.read()


def test_open_webui_lists_models(port):
    status, kind, text = send(port, "GET", "/v1/models")
    assert status == 200 and kind == "application/json"
    models = json.loads(text)["data"]
    assert [model["id"] for model in models] == [MODEL, "gpt-image-1"]
    assert all(model["object"] == "model" and model["owned_by"] for model in models)
    status, _, text = send(port, "GET", "/v1/models", key="wrong")
    assert status == 401 and json.loads(text)["error"]["message"] == "the API key is missing or wrong"


def test_open_webui_chats(port, janus):
    """A picture after the text, a system prompt, a turn before, settings of its panel, fields that Janus has not."""
    picture = np.random.default_rng(4).integers(0, 100, (40, 60, 3), np.uint8)
    user = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": data_url(picture)}}]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    body = {
        "stream": True,
        "model": MODEL,
        "messages": [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": user}],
        "stream_options": {"include_usage": True},
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 3,
        "max_tokens": LIMIT,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "stop": ["nowhere to be found"],
        # Not OpenAI's, or not Janus's: ignored.
        "min_p": 0.0,
        "repeat_last_n": 64,
        "tfs_z": 1,
        "mirostat": 0,
        "num_ctx": 2048,
        "keep_alive": "5m",
        "reasoning_effort": "medium",
        "user": {"name": "Somebody", "id": "0b1f", "email": "somebody@example.org", "role": "admin"},
    }
    status, kind, text = send(port, "POST", "/v1/chat/completions", body)
    assert status == 200 and kind.startswith("text/event-stream")
    lines = [line for line in text.decode().split("\n") if line.startswith("data:")]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[len("data:") :]) for line in lines[:-1]]
    said = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    asked = [*turns, {"role": "user", "content": f"{QUESTION}\n<image_placeholder>", "images": [picture]}]
    how = {"top_p": 0.9, "top_k": 40, "seed": 3, "system_prompt": "Be brief."}
    assert said == janus.chat(asked, (), LIMIT, 0.8, **how)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == LIMIT


TASKS = {
    "title": {"stream": False, "max_completion_tokens": LIMIT},
    "tags": {"stream": False, "max_tokens": LIMIT},
    "follow-ups": {"stream": False},
}


@pytest.mark.parametrize("how", TASKS.values(), ids=TASKS.keys())
def test_open_webui_asks_for_a_title_in_the_background(port, janus, how):
    """Not streamed, and with what it knows of the task, which may pass through."""
    output = '### Output:\nJSON: { "title": "..." }\n<chat_history>\nUSER: Hi\n</chat_history>'
    prompt = f"### Task:\nGenerate a concise title.\n{output}"
    metadata = {"task": "title_generation", "task_body": {"model": MODEL, "messages": []}, "chat_id": None}
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "metadata": metadata, **how}
    status, kind, text = send(port, "POST", "/v1/chat/completions", body)
    assert status == 200 and kind == "application/json"
    answer = json.loads(text)
    tokens = answer["usage"]["completion_tokens"]
    assert answer["choices"][0]["message"]["content"] == janus.chat(prompt, (), tokens)
    assert tokens == (LIMIT if len(how) == 2 else 512 - answer["usage"]["prompt_tokens"])


@pytest.mark.parametrize("more", [{}, {"seed": 5, "guidance": 3}], ids=["plain", "an admin's own fields"])
@pytest.mark.parametrize("response_format", [{"response_format": "b64_json"}, {"response_format": "url"}, {}], ids=str)
def test_open_webui_draws(port, janus, response_format, more):
    """A model's name of its list, a size that is not the model's; images in the answer, or fetched with the key."""
    body = {"model": "gpt-image-1", "prompt": SHORT, "n": 1, "size": "64x64", **response_format, **more}
    status, kind, text = send(port, "POST", "/v1/images/generations?api-version=1", body)
    assert status == 200 and kind == "application/json"
    answer = json.loads(text)
    (image,) = answer["data"]
    if "url" in image:
        status, kind, file = send(port, "GET", image["url"].split(f":{port}")[1])
        assert status == 200 and kind.split("/")[0] == "image"
    else:
        file = base64.b64decode(image["b64_json"])
    assert ("url" in image) == (response_format == {"response_format": "url"})
    weight = more.get("guidance", 5)
    (expected,) = janus.generate_images(SHORT, 1, cfg_weight=weight, seed=answer["seed"])
    assert answer["seed"] == more.get("seed", answer["seed"]) and answer["size"] == "64x64"
    large = Image.fromarray(np.asarray(expected)).resize((64, 64), Image.Resampling.LANCZOS)
    assert nearly_equal(np.asarray(Image.open(io.BytesIO(file))), np.asarray(large))
