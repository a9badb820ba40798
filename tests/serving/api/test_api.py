"""OpenAI's API, by OpenAI's own client against a server on loopback: answers are the library's."""

# ruff: noqa: F811  (fixtures are imported)

import gc
import http.client
import io
import logging
import re
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from janus_jax.serving.engine import Engine
from janus_jax.serving.jobs import Token, question
from tests.library.tiny_janus import QUESTION, SHORT, codes, folder, janus, nearly_equal  # noqa: F401
from tests.serving.api.mixed import Mixed, ask_all
from tests.serving.api.on_loopback import data_url, on_loopback
from tests.serving.api.tiny_server import (  # noqa: F401
    LIMIT,
    MODEL,
    NO_SYSTEM,
    Served,
    asking,
    client,
    is_free,
    make_app,
    openai,
    opened,
    pictures,
    port,
    raw,
    schema,
    served,
)

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
        schema.ChatChunk.model_validate(chunk.to_dict())
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
        (schema.CompletedImage if event is last else schema.PartialImage).model_validate(event.to_dict())
    assert last.type == "image_generation.completed" and last.usage.output_tokens == 16
    assert nearly_equal(opened(last.b64_json), janus.decode_codes(codes[:1])[0])
    assert partial and {event.type for event in partial} == {"image_generation.partial_image"}
    assert all((opened(event.b64_json) != opened(last.b64_json)).any() for event in partial)


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


# ---------------------------------------------------------------- many at once


def test_a_client_that_goes_away_frees_its_rows(client, served):
    stream = client.chat.completions.create(**asking(max_tokens=400, stream=True))
    next(stream)
    stream.close()
    assert is_free(served) and served.engine.counts.ended["cancelled"] >= 1


def on_device() -> int:
    """Bytes of arrays that are alive."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.slow
def test_200_requests_of_32_clients(janus):
    """Everyone gets what is theirs; afterwards rows and memory are as they were."""
    mixed = Mixed(janus, MODEL)
    with Engine(janus, slots=8) as engine:
        engine.warm_up()
        with (
            on_loopback(make_app(Served(engine, {MODEL: None}))) as port,
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
        ):
            # The features of pictures are kept, as many as there are different ones; so is a gray picture's code.
            for kind in ("answered", "drawn"):
                for index in range(20):
                    mixed.ask(client, index, kind)
            before, rows = on_device(), engine.running
            kinds, outcomes, _ = ask_all(mixed, client)
            assert outcomes == kinds
            deadline = time.monotonic() + 30
            while not engine.idle and time.monotonic() < deadline:
                time.sleep(0.01)
            assert engine.idle and engine.running == rows == 0 and on_device() == before
            assert engine.counts.ended["cancelled"] > 0 and engine.counts.ended["failed"] == 0
