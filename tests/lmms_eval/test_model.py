"""Janus as a model of lmms-eval: with lmms-eval itself where it is installed, else with the fields of its requests."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import sys
import tomllib
import types
from typing import Any

import pytest
from PIL import Image

import janus_jax.lmms_eval
from janus_jax.lmms_eval.questions import Settings, answer_all, question_of
from tests.library.tiny_janus import folder, janus  # noqa: F401

HERE = importlib.util.find_spec("lmms_eval") is not None
RED, BLUE = (Image.new("RGB", (40, 30), color) for color in ((255, 0, 0), (0, 0, 255)))


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(picture: Image.Image) -> dict[str, Any]:
    return {"type": "image", "url": picture}


def user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


# ---------------------------------------------------------------- requests, as documented


@dataclasses.dataclass
class Instance:
    """The fields of lmms_eval.api.instance.Instance that a model reads."""

    request_type: str
    arguments: tuple
    idx: int
    metadata: dict[str, Any]

    @property
    def args(self) -> tuple:
        return self.arguments


@dataclasses.dataclass
class Manifest:
    """Those of lmms_eval.models.registry_v2.ModelManifest."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Lmms:
    """What lmms_eval.api.model.lmms gives a model."""

    is_simple = True

    def __init__(self):
        self.task_dict = {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)


@pytest.fixture
def api(monkeypatch):
    """The class, over lmms-eval if it is installed."""
    if not HERE:
        doubles = {
            "lmms_eval": {},
            "lmms_eval.api": {},
            "lmms_eval.api.instance": {"Instance": Instance},
            "lmms_eval.api.model": {"lmms": Lmms},
            "lmms_eval.models": {},
            "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
        }
        for name, content in doubles.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "janus_jax.lmms_eval.model", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    from janus_jax.lmms_eval.model import JanusJax

    yield JanusJax
    sys.modules.pop("janus_jax.lmms_eval.model", None)


def requests_of(model: Any, docs: list[list[dict]], settings: list[dict]) -> list[Any]:
    """Requests of a task "t" whose documents are messages."""
    from lmms_eval.api.instance import Instance as Request

    model.task_dict = {"t": {"test": docs}}
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    arguments = [("", lambda doc: doc, own, number, "t", "test") for number, own in enumerate(settings)]
    return [Request("generate_until", each, 0, metadata) for each in arguments]


# ---------------------------------------------------------------- questions


def test_messages_become_a_conversation():
    messages = [
        {"role": "system", "content": [text("Be brief.")]},
        user(text("Is this "), image(RED), text("or this "), image(BLUE), text("a cat?")),
    ]
    question = question_of("t 3", messages, {"max_new_tokens": 16, "until": ["\n\n", ""], "do_sample": False})
    told = "Is this <image_placeholder>\nor this <image_placeholder>\na cat?"
    assert question.messages == [{"role": "user", "content": told, "images": [RED, BLUE]}]
    assert question.settings == Settings(16, until=("\n\n",), system_prompt="Be brief.")


GREEDY = Settings(512)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, GREEDY),
        ({"temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False, "image_aspect_ratio": "pad"}, GREEDY),
        ({"temperature": 0.7, "do_sample": False, "top_k": 3}, GREEDY),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 3}, Settings(512, 0.7, 0.9, 3)),
        ({"do_sample": True}, Settings(512, 1.0)),
        ({"do_sample": True, "temperature": 0, "seed": 0, "top_p": None}, GREEDY),
        ({"max_new_tokens": 4, "until": "x", "stop_sequences": ["y"]}, Settings(4, until=("x", "y"))),
        ({"repetition_penalty": 1.0}, GREEDY),
    ],
)
def test_settings(given, expected):
    assert question_of("t", [user(text("?"))], given).settings == expected


@pytest.mark.parametrize(
    ("messages", "given", "match"),
    [
        ([user({"type": "video", "url": "a.mp4"})], {}, "t 1: it has a part of type video; Janus takes texts"),
        ([user(text("an <image_placeholder>"))], {}, "t 1: its text has <image_placeholder>"),
        ([user(text("?"))], {"num_beams": 3}, "t 1: num_beams must be 1"),
        ([user(text("?"))], {"repetition_penalty": 1.2}, "t 1: repetition_penalty must be 1"),
        ([user(text("?"))], {"visual_cot": True}, "t 1: unknown generation settings visual_cot"),
    ],
)
def test_what_would_be_another_question_is_refused(messages, given, match):
    with pytest.raises(ValueError, match=match):
        question_of("t 1", messages, given)


@pytest.fixture
def asked(janus, monkeypatch):
    """The calls of the pipeline, which answers with the question, and then with its seed."""
    calls = []

    def chat_batch(conversations, **how):
        calls.append((len(conversations), how))
        return [f"{each[-1]['content']}. {how['seed']} END no" for each in conversations]

    monkeypatch.setattr(janus, "chat_batch", chat_batch)
    return calls


def test_questions_are_asked_in_batches_and_answered_in_order(janus, asked):
    words = ["cat", "a long question about a cat, and what it does", "dog", "bird", "fish"]
    short = {"until": [" END"], "max_new_tokens": 16}
    questions = [question_of(f"t {n}", [user(text(word))], short) for n, word in enumerate(words)]
    questions[3] = question_of("t 3", [user(text("bird"))], {"max_new_tokens": 5})
    done = []
    assert answer_all(janus, questions, 2, 7, done.append) == [
        *("cat. 7", "a long question about a cat, and what it does. 7", "dog. 7", "bird. 7 END no", "fish. 7"),
    ]
    assert sorted(count for count, _ in asked) == [1, 2, 2] == sorted(done)
    assert {how["max_new_tokens"] for _, how in asked} == {16, 5}
    assert all(how["temperature"] == 0 and how["system_prompt"] == "" for _, how in asked)


def test_repeats_differ_only_where_answers_are_drawn(janus, asked):
    drawn = question_of("t 0", [user(text("cat"))], {"temperature": 0.5})
    assert answer_all(janus, [drawn] * 3, 8) == ["cat. 0 END no", "cat. 1 END no", "cat. 2 END no"]
    greedy = question_of("t 0", [user(text("cat"))], {})
    assert answer_all(janus, [greedy] * 2, 8) == ["cat. 0 END no"] * 2


def test_an_answer_ends_with_the_context(janus, asked):
    answer_all(janus, [question_of("t", [user(text("cat"))], {"max_new_tokens": 1 << 20})], 8)
    assert asked[0][1]["max_new_tokens"] == janus.config.language.max_positions - 32


def test_a_question_that_is_too_long_is_named(janus, asked):
    long = question_of("mme 12", [user(text(" cat" * 5000))], {})
    with pytest.raises(ValueError, match=r"mme 12: .*exceeds? the model's"):
        answer_all(janus, [question_of("mme 11", [user(text("cat"))], {}), long], 8)
    assert not asked


# ---------------------------------------------------------------- the class


def test_the_registry_finds_the_class(api):
    pyproject = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())
    ((name, place),) = pyproject["project"]["entry-points"]["lmms_eval.models"].items()
    assert (name, place) == ("janus_jax", "janus_jax.lmms_eval:manifests")
    manifest = janus_jax.lmms_eval.manifests()
    assert (manifest.model_id, manifest.simple_class_path) == ("janus_jax", None)
    assert manifest.chat_class_path == f"{api.__module__}.{api.__name__}" and not api.is_simple


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"batchsize": 3, "model": "x"}, "--model_args: unknown batchsize, model"),
        ({"device": "cuda:0"}, "--device is not for janus_jax"),
        ({"mesh": "data:8"}, "mesh must look like data=8"),
        ({"batch_size": "many"}, "--batch_size must be auto or a number from 1, got 'many'"),
        ({"batch_size": 0}, "--batch_size must be"),
        ({"pretrained": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_bad_arguments(api, folder, given, match):
    with pytest.raises((ValueError, OSError), match=match):
        api(**{"pretrained": str(folder), **given})


def test_several_processes_of_torch_are_refused(api, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start lmms-eval without accelerate or torchrun"):
        api(pretrained=str(folder))


def test_what_it_cannot_do_is_said(api, janus, monkeypatch):
    monkeypatch.setattr(f"{api.__module__}.load", lambda *_, **__: janus)
    model = api(pretrained="x", batch_size="auto", max_batch_size=5)
    assert model.batch_size == 5 and api(pretrained="x").batch_size == 64
    with pytest.raises(ValueError, match="tasks that compare likelihoods have a variant that generates"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="no tasks of several rounds"):
        model.generate_until_multi_round([])


@pytest.mark.slow
def test_answers_are_those_of_chat(api, folder, janus):
    """Of each question alone, in the roles of the reports' evaluations."""
    model = api(pretrained=str(folder), batch_size=3)
    words = ["What is it?", "Is it red?", "What is this, and what is that, and where are both?", "Why?"]
    docs = [[user(image((RED, BLUE)[number % 2]), text(each))] for number, each in enumerate(words)]
    docs.append([user(text("Hello"))])
    answers = model.generate_until(requests_of(model, docs, [{"max_new_tokens": 8}] * len(docs)))
    for doc, answer in zip(docs, answers, strict=True):
        pictures = [part["url"] for part in doc[0]["content"] if part["type"] == "image"]
        words = doc[0]["content"][-1]["text"]
        assert answer == model.janus.chat(words, pictures, 8, system_prompt="")
    assert len(set(answers)) > 1 and model.janus.processor.roles == "old"


TASK = """
task: colors
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
metric_list:
  - metric: length
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image

def visual(doc):
    return [Image.new("RGB", (30, 20), doc["color"])]

def text(doc):
    return doc["question"]

def results(doc, results):
    return {"length": len(results[0])}
"""


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="lmms-eval is not installed")
def test_lmms_eval_evaluates_a_task(folder, tmp_path, monkeypatch):
    """Its own evaluator, by the name of the model, on a task of a folder."""
    from importlib.metadata import entry_points

    if "janus_jax" not in {each.name for each in entry_points(group="lmms_eval.models")}:
        pytest.skip("janus_jax is not installed")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    rows = [{"question": f"What is {n}?", "color": ("red", "blue")[n % 2], "answer": "x"} for n in range(5)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colors.yaml").write_text(TASK.format(data=tmp_path / "rows.json"))
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    found = simple_evaluate(
        "janus_jax", f"pretrained={folder}", tasks=["colors"], batch_size=4, log_samples=True,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )  # fmt: skip
    samples = found["samples"]["colors"]
    assert len(samples) == 5
    from janus_jax import load

    janus = load(folder, roles="old")
    for sample in samples:
        row = rows[sample["doc_id"]]
        picture = Image.new("RGB", (30, 20), row["color"])
        expected = janus.chat(row["question"], picture, 8, system_prompt="")
        assert sample["resps"][0][0] == expected
    assert (
        found["results"]["colors"]["length,none"] == sum(len(each["filtered_resps"][0].strip()) for each in samples) / 5
    )
