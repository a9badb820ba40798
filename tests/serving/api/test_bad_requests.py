"""What is wrong gets the right status and one clear line, and the server stays up."""

# ruff: noqa: F811  (fixtures are imported)

import base64
import http.client
import json
import socket
import struct
import zlib

import numpy as np
import pytest

from tests.library.tiny_janus import SHORT, folder, janus  # noqa: F401
from tests.serving.api.on_loopback import data_url
from tests.serving.api.tiny_server import asking, client, openai, pictures, port, raw, schema, served  # noqa: F401


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
    assert set(chat["responses"]) == {"200", *map(str, schema.OF_BODIES)} and chat["security"] == [{"key": []}]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "security" not in made["paths"]["/health"]["get"]
    replies = [
        answer for path in made["paths"].values() for how in path.values() for answer in how["responses"].items()
    ]
    errors = {json.dumps(answer["content"]) for status, answer in replies if status[0] == "4"}
    assert errors == {'{"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}'}
    for event in (schema.ChatChunk, schema.PartialImage, schema.CompletedImage):
        assert event.__name__ in made["components"]["schemas"]


def test_a_full_queue_says_when_to_come_back(client, served, monkeypatch):
    monkeypatch.setattr(served.engine, "max_queue", 0)
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(**asking())
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60
    assert raised.value.body["code"] == "queue_full"
