"""GRPO of answers: whole runs of it, its prompts and their pictures, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import MODEL, params_of, some_image, tiny_config, write_checkpoint
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.processing.chat import SYSTEM_PROMPT, Processor
from janus_jax.sharding import make_mesh
from tests.library.tiny_janus import raises_one_line
from train.config import AdapterConfig, DataConfig, EvalConfig, GrpoConfig, RewardConfig, TrainConfig
from train.plan.flops import updates_flops
from train.rl.grpo import rollout_keys
from train.rl.prompts import read_prompts
from train.rl.rollouts import rollouts_of
from train.rl.update import abstract_rows
from train.run import loop
from train.run.metrics import read_metrics
from train.validate import validate

MOST = 8
# Of answers of random parameters, some begin with such a letter, and not all.
VOWELS = RewardConfig(f"{__name__}:vowels", workers=0, batch_size=4)
GRPO = GrpoConfig(
    rewards=(VOWELS,), rollouts="answers", max_new_tokens=MOST, group=4, temperature=1.2, top_k=60, epochs=2,
    updates=2, kl=0.1,
)  # fmt: skip
QUESTIONS = [
    {"prompt": "What is it?", "images": "pictures/0.png", "answer": "a cat"},
    {"prompt": "Which of the two is brighter?", "images": ["pictures/0.png", "pictures/1.png"]},
    {"prompt": "Describe a river.", "answer": ["a river", "the river"]},
]


def vowels(answers, prompts, metadata):
    """The share of vowels in each answer."""
    assert all(isinstance(each, str) for each in answers) and len(answers) == len(prompts) == len(metadata)
    return [sum(letter in "aeiou" for letter in each) / (1 + len(each)) for each in answers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A checkpoint with its tokenizer as 'start', and a file of questions beside its pictures."""
    folder = tmp_path_factory.mktemp("answers")
    write_tokenizer(write_checkpoint(folder / "start"), image_size=MODEL.vision.image_size,
                    num_image_tokens=MODEL.vision.num_patches)  # fmt: skip
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        some_image(rng).save(folder / "pictures" / f"{number}.png")
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    return folder


@pytest.fixture(scope="module")
def processor(folder) -> Processor:
    return Processor.from_folder(folder / "start", MODEL)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda shape: make_mesh({}, jax.devices()[:1]))


def config_of(folder, workdir="run", grpo: GrpoConfig = GRPO, **changes) -> TrainConfig:
    nothing = dict.fromkeys(("understanding", "text", "generation"), "")
    made = tiny_config(
        nothing | {"tokenizer": ""}, workdir, init_from=f"{folder}/start", batch_size=8, evaluation=EvalConfig(),
        data=DataConfig(context=160, images_per_row=2, workers=0), loss_chunk=MOST,
        grpo=dataclasses.replace(grpo, prompts=(f"{folder}/questions.jsonl",)),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_two_and_two_steps_are_four(folder, tmp_path, one_device):
    """Bit for bit, with several updates a step, rollouts in parts, and the encoder among what is trained."""
    config = config_of(folder, tmp_path / "whole", dataclasses.replace(GRPO, draw_batch=4))
    whole = loop.train(config)
    half = dataclasses.replace(config, workdir=str(tmp_path / "half"), steps=2)
    loop.train(half)
    loop.train(dataclasses.replace(half, steps=4))
    before = params_of(tmp_path / "whole")
    for path, x in params_of(tmp_path / "half").items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)
    lines = [[line for line in read_metrics(tmp_path / name) if "train/reward" in line] for name in ("whole", "half")]
    for name in ("train/reward", "train/answer_length", "train/kl"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]]
    first, last = lines[0][0], lines[0][-1]
    assert first["train/finite"] == 1 and 0 < first["train/kl"] < last["train/kl"]
    assert 1 < first["train/answer_length"] <= MOST and first["train/failed_groups"] == 0
    assert whole.exists() and not (tmp_path / "whole" / "failures.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_the_first_ratio_is_1_on_any_mesh(count, folder, tmp_path, monkeypatch):
    """In a run: what is trained first has the probability with which it was drawn; and parts and shards draw alike."""
    monkeypatch.setattr(loop, "make_mesh", lambda shape: make_mesh({"fsdp": count}, jax.devices()[:count]))
    grpo = dataclasses.replace(GRPO, epochs=1, updates=1, draw_batch=4, kl=0.0)
    config = config_of(folder, tmp_path / "run", grpo, steps=1)
    loop.train(config)
    (line,) = read_metrics(config.workdir)
    assert line["train/drift"] <= 1e-5 and line["train/clip_share"] == 0 and line["train/grad_norm"] > 0
    assert line["train/reward"] == pytest.approx(expected_reward(folder), rel=1e-6)


def expected_reward(folder) -> float:
    """Of the first step's answers, by the pipeline that draws, all at once on one device."""
    janus = janus_jax.load(folder / "start", dtype="float32", progress=False)
    config = config_of(folder)
    rollouts = rollouts_of(config, janus.processor)
    prompts = rollouts.prompts.of_step(0, 2)
    given = {name: np.repeat(x, GRPO.group, axis=0) for name, x in rollouts.given(prompts)[0].items()}
    drawn = rollouts.draw(janus, given, rollout_keys(config.seed, 0, 8), None)
    return float(np.mean(vowels(rollouts.judged(janus, drawn), [""] * 8, [{}] * 8)))


@pytest.mark.slow
def test_an_adapter_learns_from_questions_without_pictures(folder, tmp_path, one_device):
    """Over frozen parameters, from a file of text, with what fits in memory drawn at a time."""
    (tmp_path / "questions.txt").write_text("What is a river?\n\nWho counts the boats?\n")
    grpo = dataclasses.replace(GRPO, group=4)
    config = config_of(folder, tmp_path / "run", grpo, stage=3, adapter=AdapterConfig(rank=4), steps=2)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, context=128, images_per_row=0),
        grpo=dataclasses.replace(grpo, prompts=(str(tmp_path / "questions.txt"),)),
    )  # fmt: skip
    assert (loop.train(config) / "adapter_config.json").exists()
    first, last = read_metrics(config.workdir)
    assert first["train/finite"] == 1 and first["train/grad_norm"] > 0 and last["train/kl"] > first["train/kl"] > 0


@pytest.mark.slow
def test_a_picture_that_is_damaged_later_costs_its_group(folder, tmp_path, one_device, capsys):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "pictures" / "1.png").write_bytes(b"no picture")
    config = config_of(tmp_path / "data", tmp_path / "run", batch_size=12, steps=1)
    loop.train(config)
    (line,) = read_metrics(config.workdir)
    assert line["train/damaged"] == 1 and line["train/failed_groups"] == 1 and line["train/finite"] == 1
    assert "step 1: left out" in capsys.readouterr().out
    assert "1.png: not an image" in (tmp_path / "run" / "damaged-0.txt").read_text()


# ---------------------------------------------------------------- prompts, and what is refused


def test_prompts_are_those_of_chat(folder, processor):
    """Ids, placeholders and pixels of the pipeline's own conversations; every line's other fields are for rewards."""
    rollouts = rollouts_of(config_of(folder), processor)
    prompts = rollouts.prompts.prompts
    given, problems = rollouts.given(prompts)
    assert not problems and [each.metadata for each in prompts] == [
        {name: x for name, x in line.items() if name != "prompt"} for line in QUESTIONS
    ]
    paths = [[folder / path for path in np.atleast_1d(line.get("images", []))] for line in QUESTIONS]
    asked = [line["prompt"] for line in QUESTIONS]
    ids, where, pixels, mask = processor.understanding_batch(asked, paths, SYSTEM_PROMPT, MOST)
    for name, wanted in (("ids", ids), ("mask", mask), ("where", where)):
        own = given[name].reshape(len(asked), -1)
        for row in range(len(asked)):
            np.testing.assert_array_equal(own[row][-mask[row].sum() :], wanted[row][-mask[row].sum() :])
            assert not given["mask"][row, 0][: -mask[row].sum()].any()
    np.testing.assert_array_equal(given["pixels"], pixels)
    without = dataclasses.replace(config_of(folder).data, images_per_row=0)
    with raises_one_line(
        "questions.jsonl, line 1: pictures of the prompt: 1, more than data.images_per_row=0; raise it"
    ):
        rollouts_of(config_of(folder, data=without), processor)


def test_what_is_behind_an_end_is_not_said(folder, processor):
    rollouts, eos = rollouts_of(config_of(folder), processor), processor.tokenizer.eos_id
    told = np.array([[5, eos, eos, eos], [eos, eos, eos, eos], [9, 8, 7, 6]], np.int32)
    given = rollouts.given(rollouts.prompts.prompts)[0]
    pipeline = types.SimpleNamespace(sample_tokens=lambda asked, batch_size: told)
    drawn = rollouts.draw(pipeline, given, jax.random.split(jax.random.key(0), 3), None)
    np.testing.assert_array_equal(drawn["said"], np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool))
    decode = processor.tokenizer.decode
    assert rollouts.judged(pipeline, drawn) == [decode([5]).strip(), "", decode([9, 8, 7, 6]).strip()]
    assert rollouts.figures(drawn) == {"distinct": 1.0, "answer_length": 7 / 3, "unfinished": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": " "}', "the prompt must be text that asks something, got ' '"),
        ('{"prompt": 3}', "the prompt must be text that asks something, got 3"),
        ('{"prompt": "' + "old " * 200 + '"}', "the prompt of"),
        ('{"prompt": "a", "images": "/etc/no.png"}', "a picture is outside the folder of the file of prompts"),
        ('{"prompt": "a", "images": [3]}', "an image must be a path or bytes, got 3"),
        ('{"prompt": "a", "images": "http://x/no.png"}', "is not fetched; download it and use its path"),
        ('{"prompt": "<image_placeholder> a"}', "hold 1 <image_placeholder> but there are 0 images"),
    ],
)
def test_bad_questions_are_named(line, told, processor, tmp_path):
    (tmp_path / "bad.jsonl").write_text(f'{{"prompt": "a river"}}\n{line}\n')
    with raises_one_line("bad.jsonl, line 2: ") as error:
        read_prompts([str(tmp_path / "bad.jsonl")], processor, 150, seed=0, images=1)
    assert told in str(error.value)


def test_a_missing_picture_is_named(processor, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "images": ["no.png"]}')
    with pytest.raises(FileNotFoundError, match=r"bad.jsonl, line 1: the picture .*no.png is missing; copy it there"):
        read_prompts([str(tmp_path / "bad.jsonl")], processor, 150, seed=0, images=1)


def test_bad_configs_are_named(folder):
    config = config_of(folder)
    assert validate(config) == [] and not config.grpo.guided
    for changes, told in (
        ({"rewards": ()}, "grpo.rewards is empty; name what judges the answers"),
        ({"temperature": 0.0}, "at 0, all answers of a group are the same"),
        ({"speculate": 4}, "grpo.speculate=4 is of pictures' codes; with grpo.rollouts=answers leave it at 0"),
        ({"loss": "conditional"}, "grpo.loss=conditional is of guidance, which answers lack"),
        ({"max_new_tokens": 0}, "grpo.max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 158}, "has no room for a prompt beside the 158 tokens of an answer"),
        ({"max_new_tokens": 12}, "loss_chunk=8 does not divide the 12 tokens of an answer"),
    ):
        with raises_one_line(told):
            validate(dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, **changes)))
    with raises_one_line("data.images_per_row must be at least 0"):
        validate(dataclasses.replace(config, data=dataclasses.replace(config.data, images_per_row=-1)))
    with raises_one_line("init_from is empty, but grpo starts from a model that answers"):
        validate(dataclasses.replace(config, init_from="", tokenizer="t"))


def test_plans_know_answers(folder):
    """The rows that are compiled ahead are those of a step; without pictures there are no pixels, and less to do."""
    config, mesh = config_of(folder), make_mesh({"fsdp": 1}, jax.devices()[:1])
    rows = abstract_rows(config, mesh)
    size = MODEL.vision.image_size
    assert rows["ids"].shape == rows["mask"].shape == (8, 1, 160 - MOST)
    assert rows["where"].shape == (8, 160 - MOST) and rows["pixels"].shape == (8, 2, size, size, 3)
    assert {rows[name].shape for name in ("tokens", "said", "old", "reference")} == {(8, MOST)}
    assert set(rows) == {
        "ids", "mask", "where", "pixels", "tokens", "said", "old", "reference", "advantage", "live"
    }  # fmt: skip
    blind = dataclasses.replace(config, data=dataclasses.replace(config.data, images_per_row=0))
    assert "pixels" not in abstract_rows(blind, mesh)
    assert updates_flops(blind) < updates_flops(config)
