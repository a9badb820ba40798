"""OpenAI's API, by OpenAI's own client against a server on loopback: answers are the library's, errors are clear."""

# ruff: noqa: F811  (fixtures are imported)

import base64
import concurrent.futures
import http.client
import io
import json
import logging
import pathlib
import re
import shlex
import shutil
import socket
import struct
import subprocess
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from janus_jax.serving.engine import Engine
from janus_jax.serving.jobs import Token, question
from tests.library.tiny_janus import QUESTION, SHORT, codes, folder, janus, nearly_equal  # noqa: F401
from tests.serving.on_loopback import data_url, on_loopback

openai = pytest.importorskip("openai")
for name in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(name)

from janus_jax.serving.api.app import make_app  # noqa: E402
from janus_jax.serving.api.media import Remote  # noqa: E402
from janus_jax.serving.api.schema import OF_BODIES, ChatChunk, CompletedImage, PartialImage  # noqa: E402
from janus_jax.serving.api.served import Limits, Served  # noqa: E402

MODEL, LIMIT = "janus-tiny", 20
NO_SYSTEM = {"role": "system", "content": ""}


@pytest.fixture(scope="module")
def served(janus):
    with Engine(janus, slots=5, max_queue=40) as engine:
        limits = Limits(body=1 << 20, body_seconds=1.0, images=3)
        yield Served(engine, {MODEL: None, "other-name": None}, limits, api_key="secret", remote=Remote(("localhost",)))


@pytest.fixture(scope="module")
def port(served):
    with on_loopback(make_app(served)) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.integers(low, low + 100, (40, 60, 3), np.uint8) for low in (0, 80, 155)]


def asking(*pictures, text: str = QUESTION, **how):
    images = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    user = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
    return {"model": MODEL, "messages": [NO_SYSTEM, user], "max_tokens": LIMIT} | how


def opened(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def is_free(served: Served) -> bool:
    deadline = time.monotonic() + 30
    while not served.engine.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    return served.engine.idle


# ---------------------------------------------------------------- chat


def test_an_answer_is_that_of_a_job(client, served, janus, pictures):
    """Which is `chat`'s, as the engine's tests show."""
    made = client.chat.completions.create(**asking(pictures[0]))
    over, job = threading.Event(), question(janus, QUESTION, pictures[:1], LIMIT, system_prompt="")
    job.notify = lambda event: None if isinstance(event, Token) else over.set()
    served.engine.submit(job)
    assert over.wait(60)
    choice = made.choices[0]
    assert choice.message.content == janus.processor.tokenizer.answer(job.tokens)
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert made.object == "chat.completion" and made.model == MODEL
    assert made.usage.completion_tokens == len(job.tokens) and made.usage.prompt_tokens == job.prompt_tokens
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens


@pytest.mark.slow
def test_an_answer_is_that_of_chat(client, janus, pictures):
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    for how in ({}, drawn):
        made = client.chat.completions.create(**asking(pictures[0], **how), n=2 if how else 1)
        expected = janus.chat(QUESTION, pictures[:1], LIMIT, system_prompt="", **how)
        choice = made.choices[0]
        assert choice.message.content == expected
    second = janus.chat(QUESTION, pictures[:1], LIMIT, system_prompt="", **drawn | {"seed": 4})
    assert made.choices[1].message.content == second, "a further choice has the next seed"


def test_streams_join_to_the_answer(client, pictures):
    how = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    chunks = list(client.chat.completions.create(**asking(pictures[0], **how)))
    for chunk in chunks:
        ChatChunk.model_validate(chunk.to_dict())
    *content, end, usage = chunks
    assert content[0].choices[0].delta.role == "assistant" and content[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content for chunk in content)
    assert text == client.chat.completions.create(**asking(pictures[0])).choices[0].message.content
    assert end.choices[0].finish_reason == "length" and usage.choices == []
    assert usage.usage.completion_tokens == LIMIT and len({chunk.id for chunk in chunks}) == 1
    noted = [token for chunk in content if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert len(noted) == LIMIT and all(token.logprob <= 0 for token in noted)


def test_stop_strings_end_answers(client, janus):
    full = client.chat.completions.create(**asking(logprobs=True)).choices[0]
    text = full.message.content
    stop = text[len(text) // 2 :][:3]
    for stream in (False, True):
        made = client.chat.completions.create(**asking(stop=[stop, "nowhere to be found"], stream=stream))
        if stream:
            made = list(made)
            said, reason = "".join(c.choices[0].delta.content or "" for c in made), made[-1].choices[0].finish_reason
        else:
            said, reason = made.choices[0].message.content, made.choices[0].finish_reason
        assert said == text[: text.index(stop)].strip() and reason == "stop"


@pytest.mark.slow
def test_shapes_that_clients_send(client, janus, pictures):
    """Plain strings, null content, unknown fields, a URL that is a string, text around pictures."""
    expected = janus.chat("<image_placeholder>\nWhat is it?", pictures[:1], LIMIT, system_prompt="")
    part = {"type": "image_url", "image_url": data_url(pictures[0])}
    messages = [NO_SYSTEM, {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
    more = {"extra_body": {"user": "somebody", "store": False, "metadata": {"a": "b"}, "n": None, "stop": None}}
    made = client.chat.completions.create(model="other-name", messages=messages, max_completion_tokens=LIMIT, **more)
    assert made.choices[0].message.content == expected and made.model == "other-name"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    made = client.chat.completions.create(**asking() | {"messages": [*turns, {"role": "user", "content": QUESTION}]})
    assert made.choices[0].message.content == janus.chat([*turns, {"role": "user", "content": QUESTION}], (), LIMIT)


# ---------------------------------------------------------------- drawing


@pytest.mark.slow
def test_images_are_those_of_generate_images(client, janus, codes, port):
    expected = janus.decode_codes(codes)
    made = client.images.generate(model=MODEL, prompt=SHORT, n=2, extra_body={"seed": 0})
    assert [nearly_equal(opened(image.b64_json), x) for image, x in zip(made.data, expected, strict=False)] == [
        True
    ] * 2
    assert made.size == "16x16" and made.usage.output_tokens == 2 * 16
    how = {"response_format": "url", "size": "64x64", "extra_body": {"seed": 0}}
    made = client.images.generate(prompt=SHORT, **how)
    path = made.data[0].url.split(f":{port}")[1]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)  # without a key: the name is the key
    answer = connection.getresponse()
    assert answer.status == 200 and answer.getheader("content-type") == "image/png"
    large = Image.fromarray(expected[0]).resize((64, 64), Image.Resampling.LANCZOS)
    assert nearly_equal(np.asarray(Image.open(io.BytesIO(answer.read()))), np.asarray(large))


@pytest.mark.slow
def test_a_picture_grows(client, janus, codes):
    events = list(client.images.generate(prompt=SHORT, stream=True, partial_images=2, extra_body={"seed": 0}))
    *partial, last = events
    for event in events:
        (CompletedImage if event is last else PartialImage).model_validate(event.to_dict())
    assert last.type == "image_generation.completed" and last.usage.output_tokens == 16
    assert nearly_equal(opened(last.b64_json), janus.decode_codes(codes[:1])[0])
    assert partial and {event.type for event in partial} == {"image_generation.partial_image"}
    assert all((opened(event.b64_json) != opened(last.b64_json)).any() for event in partial)


# ---------------------------------------------------------------- what is wrong


def text_url(text: bytes) -> dict:
    url = "data:image/png;base64," + base64.b64encode(text).decode()
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def pointing_at(url: str) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def bomb() -> str:
    """A PNG of a few bytes that claims 60000 pixels a side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(file).decode()


CHAT_ERRORS = {
    "no model": ({"model": "gpt"}, 404, "no model named gpt"),
    "no answers": ({"n": 0}, 400, "n: Input should be greater than or equal to 1"),
    "many answers": ({"n": 99}, 400, "n must be at most 8"),
    "cold": ({"temperature": -1}, 400, "temperature"),
    "beyond the context": ({"max_tokens": 5000}, 400, "exceeds the model's 512 positions"),
    "long": ({"messages": [{"role": "user", "content": "What is it? " * 300}]}, 400, "exceeds the model's"),
    "longer": ({"messages": [{"role": "user", "content": "a" * 40000}]}, 400, "cannot fit the context"),
    "empty": ({"messages": []}, 400, "messages"),
    "blank": ({"messages": [{"role": "user", "content": ""}]}, 400, "empty"),
    "its own turn": ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "user first"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
    "JSON": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "stop": ({"stop": [""]}, 400, "stop"),
    "text as a picture": (text_url(b"hello"), 400, "messages.0.content.0"),
    "a path": (pointing_at("/etc/passwd"), 400, "data URL"),
    "a host": (pointing_at("http://169.254.169.254/latest"), 400, "data URL"),
    "a private host": (pointing_at("http://localhost:9/x.png"), 400, "private address"),
    "300 pictures": ({"messages": [{"role": "user", "content": 300 * [
        {"type": "image_url", "image_url": {"url": data_url(np.zeros((4, 4, 3), np.uint8))}}]}]},
        400, "there are 300 images, and may be 3"),
    "an image bomb": (pointing_at(bomb()), 400, "messages.0.content.0: <data URI>: the image is too large"),
    "text by its type": (pointing_at("data:text/plain;base64,aGVsbG8="), 400, "not an image of a known format"),
    "text as it is": (pointing_at("data:text/plain,hello"), 400, "expected 'data:image/...;base64,...'"),
    "a number as text": ({"n": "2"}, 400, "n: Input should be a valid integer"),
    "a part without its type": ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
        400, "messages.0.content.0.type: Field required"),
    "a part without its text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400, "messages.0.content.0 must be a text with its text"),
    "a role": ({"messages": [{"role": "tool", "content": "Hi"}]}, 400, "messages.0.role"),
    "large": ({"messages": [{"role": "user", "content": "a" * (1 << 20)}]}, 413, "1 MiB"),
}  # fmt: skip
IMAGE_ERRORS = {
    "blank": ({"prompt": " "}, 400, "must be text that says what to draw"),
    "none": ({"n": 0}, 400, "n: "),
    "many": ({"n": 11}, 400, "at most 10"),
    "wide": ({"size": "1536x1024"}, 400, "square"),
    "no size": ({"size": "large"}, 400, "WIDTHxHEIGHT"),
    "huge": ({"size": "9000x9000"}, 400, "2048"),
    "quality": ({"quality": "hd"}, 400, "quality"),
    "two streams": ({"n": 2, "stream": True}, 400, "one image"),
    "seed": ({"extra_body": {"seed": -1}}, 400, "seed"),
}


@pytest.mark.parametrize("how, status, message", CHAT_ERRORS.values(), ids=CHAT_ERRORS.keys())
def test_chat_refuses(client, how, status, message):
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**asking() | how)
    assert raised.value.status_code == status and message in raised.value.body["message"]
    assert "\n" not in raised.value.body["message"] and raised.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize("how, status, message", IMAGE_ERRORS.values(), ids=IMAGE_ERRORS.keys())
def test_drawing_refuses(client, how, status, message):
    with pytest.raises(openai.APIStatusError) as raised:
        client.images.generate(**{"prompt": SHORT} | how)
    assert raised.value.status_code == status and message in raised.value.body["message"]


def raw(port: int, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {"Authorization": "Bearer secret", **headers})
    answer = connection.getresponse()
    return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()


def test_what_no_client_sends(port):
    here = {"Content-Type": "application/json"}
    for body, how, expected, message in (
        (b"{", here, 400, "the body is not JSON"),
        (b"[" * 100_000, here, 400, ""),
        (b"\xff", here, 400, ""),
        (b"null", here, 400, ""),
        (b'{"model": 3}', here, 400, ""),
        (b'{"seed": ' + b"1" * 5000 + b"}", here, 400, ""),
        (b'{"model": "\\ud800", "messages": [{"role": "user"}]}', here, 404, "no model named \\ud800"),
        (
            b'{"model": "x", "messages": [{"role": "user"}], "temperature": NaN}',
            here,
            400,
            "temperature: Input should be a finite number",
        ),
        (b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, 400, "Content-Type: application/json"),
        (b"{}", here | {"Content-Encoding": "gzip"}, 415, "must not be compressed"),
    ):
        status, _, answer = raw(port, "POST", "/v1/chat/completions", body, **how)
        assert status == expected and message in json.loads(answer)["error"]["message"]
    for method, path, expected in (
        ("GET", "/v1/none", 404),
        ("GET", "/v1/chat/completions/", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/x", 404),
    ):
        status, _, answer = raw(port, method, path)
        assert status == expected and json.loads(answer)["error"]["message"]
    assert raw(port, "GET", "/health", Authorization="")[0] == 200


def test_a_wrong_key(client, port):
    for given in ("Bearer wrong", "Basic secret", "secret", ""):
        assert raw(port, "GET", "/v1/models", Authorization=given)[0] == 401
    with pytest.raises(openai.AuthenticationError) as raised:
        client.with_options(api_key="wrong").chat.completions.create(**asking())
    assert raised.value.body["message"] == "the API key is missing or wrong"
    assert raised.value.body["code"] == "invalid_api_key"


def test_a_body_that_does_not_come(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    for key, value in {"Authorization": "Bearer secret", "Content-Length": "100"}.items():
        connection.putheader(key, value)
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert answer.status == 408 and json.loads(answer.read())["error"]["message"] == "the body did not come within 1 s"


def test_a_body_of_100_megabytes(port):
    """Told how long it is, the server waits for none of it; else it keeps no more than it may."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer secret\r\n"
    for length, pieces in ((b"Content-Length: 104857600", 0), (b"Transfer-Encoding: chunked", 100)):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as own:
            own.sendall(head + length + b"\r\n\r\n")
            for _ in range(pieces):
                own.sendall(b"100000\r\n" + b"a" * (1 << 20) + b"\r\n")
            answer = http.client.HTTPResponse(own)
            answer.begin()
            message = json.loads(answer.read())["error"]["message"]
            assert answer.status == 413 and message == "the body has more than 1 MiB; send smaller images, or fewer"
    assert raw(port, "GET", "/health")[0] == 200


def test_a_failure_of_the_server_s_own(client, served, monkeypatch, caplog):
    """One answer of OpenAI's form with the request's id, and one entry in the log, which has the id too."""
    monkeypatch.setattr(served.engine, "submit", None)
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(**asking(), extra_headers={"X-Request-Id": "abc-2"})
    assert raised.value.body["type"] == "server_error" and "its log says why" in raised.value.body["message"]
    assert raised.value.response.headers["x-request-id"] == "abc-2"
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_the_server_describes_itself(port):
    """What schemathesis goes by: all paths, and errors as they are."""
    status, _, text = raw(port, "GET", "/openapi.json")
    assert status == 200
    made = json.loads(text)
    chat = made["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) == {"200", *map(str, OF_BODIES)} and chat["security"] == [{"key": []}]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "security" not in made["paths"]["/health"]["get"]
    replies = [
        answer for path in made["paths"].values() for how in path.values() for answer in how["responses"].items()
    ]
    errors = {json.dumps(answer["content"]) for status, answer in replies if status[0] == "4"}
    assert errors == {'{"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}'}
    for event in (ChatChunk, PartialImage, CompletedImage):
        assert event.__name__ in made["components"]["schemas"]


def test_models_metrics_and_log(client, port, caplog):
    caplog.set_level(logging.INFO, "janus_jax.serving")
    assert [model.id for model in client.models.list()] == [MODEL, "other-name"]
    assert client.models.retrieve(MODEL).id == MODEL
    client.chat.completions.create(**asking(text="Somebody's secret."), extra_headers={"X-Request-Id": "abc-1"})
    status, headers, text = raw(port, "GET", "/metrics", **{"X-Request-Id": "bad\x01id"})
    assert status == 200 and "text/plain" in headers["content-type"] and len(headers["x-request-id"]) == 32
    figures = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert float(figures["janus_generation_tokens_total"]) >= LIMIT
    assert float(figures["janus_time_to_first_token_seconds_count"]) >= 1
    assert any("abc-1 POST /v1/chat/completions 200" in record.message for record in caplog.records)
    assert "secret" not in caplog.text


def test_the_page_needs_no_key_and_loads_nothing_else(port):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, text = raw(port, "GET", path, Authorization="")
        assert status == 200 and headers["content-type"] == f"{kind}; charset=utf-8"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert re.findall(r"\w+://[^ '\"]*", text.decode()) in ([], ["http://www.w3.org/2000/svg"])
    assert raw(port, "GET", "/page.html", Authorization="")[0] == 401


@pytest.mark.slow
def test_the_examples_of_the_docs(port):
    """As curl sends them."""
    curl = shutil.which("curl") or pytest.skip("there is no curl here")
    text = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    commands = re.findall(r"```bash\ncurl (.*?)```", text, re.DOTALL)
    answers = []
    for command in commands:
        own = command.replace("\\\n", " ").replace(":8000", f":{port}").replace("Janus-Pro-7B", MODEL)
        args = [curl, "-sS", "--fail-with-body", "-H", "Authorization: Bearer secret", *shlex.split(own)]
        answers.append(json.loads(subprocess.run(args, capture_output=True, check=True, timeout=300).stdout))
    chat, drawn, described = answers
    assert described["openapi"]
    assert chat["choices"][0]["message"]["content"] and chat["usage"]["completion_tokens"] <= 60
    assert len(drawn["data"]) == 2 and drawn["seed"] == 0
    assert raw(port, "GET", drawn["data"][1]["url"].split(f":{port}")[1])[0] == 200


@pytest.mark.slow
def test_the_python_examples_of_the_docs(port, janus, pictures, monkeypatch, capsys, tmp_path):
    text = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    of_client, of_engine = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for written, here in (
        (":8000", f":{port}"),
        ('api_key="none"', 'api_key="secret"'),
        ("data:image/png;base64,...", data_url(pictures[0])),
        ("Janus-Pro-7B", MODEL),
        ("stream=True", f"stream=True, max_tokens={LIMIT}"),
    ):
        assert written in of_client
        of_client = of_client.replace(written, here)
    made: dict = {}
    exec(of_client, made)
    assert capsys.readouterr().out and opened(made["drawn"].data[0].b64_json).shape == (16, 16, 3)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pictures[0]).save("bicycle.png")
    end = '    engine.submit(job, *drawings(janus, "a red bicycle", 4))\n'
    assert of_engine.endswith(end)
    # The example goes on as its reader's program does; here it is waited for.
    exec(of_engine.replace(", slots=16", ", slots=6") + "    engine.close(60)\n", {"janus": janus})
    assert "Ended" in capsys.readouterr().out


# ---------------------------------------------------------------- many at once


def test_a_client_that_goes_away_frees_its_rows(client, served):
    stream = client.chat.completions.create(**asking(max_tokens=400, stream=True))
    next(stream)
    stream.close()
    assert is_free(served) and served.engine.counts.ended["cancelled"] >= 1


@pytest.mark.slow
def test_many_clients_get_what_is_theirs(client, served, janus, pictures, codes):
    images = janus.decode_codes(codes)
    answers = {which: janus.chat(QUESTION, [x], LIMIT, system_prompt="") for which, x in enumerate(pictures)}

    def ask(which: int):
        if which % 4 == 3:
            made = client.images.generate(prompt=SHORT, n=2, extra_body={"seed": 0})
            return [nearly_equal(opened(x.b64_json), image) for x, image in zip(made.data, images, strict=False)]
        if which % 4 == 2:
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**asking(), top_p=0)
        made = client.chat.completions.create(**asking(pictures[which % 3]), stream=which % 2 == 0)
        text = made.choices[0].message.content if which % 2 else "".join(c.choices[0].delta.content or "" for c in made)
        return text == answers[which % 3]

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        assert all(np.all(right) for right in threads.map(ask, range(32)))
    assert is_free(served)


def test_a_full_queue_says_when_to_come_back(client, served, monkeypatch):
    monkeypatch.setattr(served.engine, "max_queue", 0)
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(**asking())
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60
    assert raised.value.body["code"] == "queue_full"
