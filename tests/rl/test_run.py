"""Whole runs of GRPO and DPO, on tiny models: resumed, in several processes, and what bad input gets."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import janus_jax
from examples.tiny.run import encode, params_of, tiny_config, write_checkpoint, write_data
from janus_jax.processing.chat import Processor
from janus_jax.sharding import flatten, make_mesh
from janus_jax.weights.adapters.peft_files import CONFIG, WEIGHTS
from tests.library.tiny_janus import raises_one_line
from tests.raw.test_sources import png
from train.config import (
    AdapterConfig,
    DataConfig,
    DpoConfig,
    EvalConfig,
    GrpoConfig,
    RewardConfig,
    TrainConfig,
)
from train.prepare import prepare
from train.raw.sources import RawSample
from train.rl.advantages import advantages
from train.rl.dpo import Dpo
from train.rl.grpo import Grpo, rollout_keys
from train.rl.prompts import read_prompts
from train.run import loop
from train.run.metrics import read_metrics
from train.validate import check_mesh, validate

BRIGHT = RewardConfig("train.rl.rewards.brightness:brightness", workers=0, batch_size=4)
GRPO = GrpoConfig(
    prompts=("prompts.jsonl",), rewards=(BRIGHT,), group=4, guidance=2.0, top_k=40, epochs=2, updates=2, kl=0.1
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Prepared data, a checkpoint with its tokenizer as 'start', and a file of prompts as 'prompts'."""
    folder = tmp_path_factory.mktemp("rl")
    made = write_data(folder / "data", count=6)
    start = write_checkpoint(folder / "start")
    for path in pathlib.Path(made["tokenizer"]).iterdir():
        shutil.copy(path, start)
    prompts = folder / "prompts.jsonl"
    lines = [{"prompt": text, "wanted": i} for i, text in enumerate(("a red house", "a tall tree", "two cats"))]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made | {"start": str(start), "prompts": str(prompts)}


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda shape: make_mesh({}, jax.devices()[:1]))


def grpo_config(folders, workdir, grpo: GrpoConfig = GRPO, **changes) -> TrainConfig:
    made = tiny_config(
        folders, workdir, init_from=folders["start"], tokenizer="", batch_size=8, stage=2,
        data=DataConfig(context=64, workers=0), evaluation=EvalConfig(), loss_chunk=16,
        grpo=dataclasses.replace(grpo, prompts=(folders["prompts"],)),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.mark.slow
def test_two_and_two_steps_are_four(folders, tmp_path, one_device):
    """Bit for bit, with several updates a step and a reference that moves away from nothing."""
    config = grpo_config(folders, tmp_path / "whole")
    whole = loop.train(config)
    half = dataclasses.replace(config, workdir=str(tmp_path / "half"), steps=2)
    loop.train(half)
    resumed = loop.train(dataclasses.replace(half, steps=4))
    for path in whole.rglob("*"):
        if path.is_file() and path.suffix in (".safetensors", ".bin"):
            assert path.read_bytes() == (resumed / path.relative_to(whole)).read_bytes(), path
    for path, x in params_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(x, params_of(tmp_path / "half")[path], err_msg=path)
    lines = [[line for line in read_metrics(tmp_path / name) if "train/reward" in line] for name in ("whole", "half")]
    assert [line["train/reward"] for line in lines[0]] == [line["train/reward"] for line in lines[1]]
    first, last = lines[0][0], lines[0][-1]
    assert first["train/finite"] == 1 and first["train/distinct"] > 0.9
    # The first of four updates is that of the model that drew, which is the reference, too.
    assert 0 < first["train/kl"] < last["train/kl"]
    assert first["train/drift"] > 0 and not (tmp_path / "whole" / "failures.txt").exists()


@pytest.mark.slow
def test_guessed_codes_draw_the_same_pictures(folders, tmp_path, one_device):
    """Rewards, and what is learned from them, are those of one code after the other."""
    told = {}
    for window in (1, 4):
        grpo = dataclasses.replace(GRPO, speculate=window)
        config = grpo_config(folders, tmp_path / str(window), grpo, steps=2)
        loop.train(config)
        told[window] = [line for line in read_metrics(config.workdir) if "train/reward" in line]
    for plain, guessed in zip(*told.values(), strict=True):
        for name in ("reward", "reward_spread", "distinct", "kl", "entropy"):
            assert guessed[f"train/{name}"] == pytest.approx(plain[f"train/{name}"], rel=1e-6), name
        assert plain["train/drawing_seconds"] > 0 and plain["train/waiting_seconds"] >= 0


@pytest.mark.slow
def test_dpo_two_and_two_steps_are_four(folders, tmp_path, one_device):
    """The reference is what the run started from: at first no margin; it is computed once, for later runs too."""
    processor = Processor.from_folder(folders["start"], tiny_config(folders, "run").model)
    rng = np.random.default_rng(0)
    pictures = [tuple(png(tuple(rng.integers(0, 255, 3).tolist())) for _ in range(2)) for _ in range(5)]
    samples = [RawSample(str(i), prompt=f"a tree {i}", images=pair) for i, pair in enumerate(pictures)]
    prepare(samples, tmp_path / "pairs", "preference", processor, batch_size=4, context=96, encode=encode,
            progress=False)  # fmt: skip
    dpo = DpoConfig(pairs=(str(tmp_path / "pairs"),), beta=0.5)
    config = dataclasses.replace(grpo_config(folders, tmp_path / "whole"), grpo=None, dpo=dpo, batch_size=4)
    whole = loop.train(config)
    assert (tmp_path / "pairs" / "reference.npz").exists()
    half = dataclasses.replace(config, workdir=str(tmp_path / "half"), steps=2)
    loop.train(half)
    resumed = loop.train(dataclasses.replace(half, steps=4))
    for path in whole.rglob("*.safetensors"):
        assert path.read_bytes() == (resumed / path.relative_to(whole)).read_bytes(), path
    for path, x in params_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(x, params_of(tmp_path / "half")[path], err_msg=path)
    lines = read_metrics(config.workdir)
    assert lines[0]["train/margin"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["train/dpo_loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert lines[-1]["train/dpo_loss"] < 0.6 and lines[-1]["train/preferred"] == 1

    other = write_checkpoint(tmp_path / "other", seed=1)
    for path in pathlib.Path(folders["tokenizer"]).iterdir():
        shutil.copy(path, other)
    with raises_one_line("has log-probabilities of another reference"):
        loop.train(dataclasses.replace(config, workdir=str(tmp_path / "new"), init_from=str(other)))


@pytest.mark.slow
def test_an_adapter_learns_and_the_reference_is_the_base_below_it(folders, tmp_path, one_device, monkeypatch):
    """And nothing else changes; two and two steps are four, bit for bit."""
    adapter = AdapterConfig(rank=2, targets=("decoder",))
    config = grpo_config(folders, tmp_path / "whole", stage=3, adapter=adapter)
    ends = []

    def step(self, state, frozen, batch, own=Grpo.step):
        state, metrics = own(self, state, frozen, batch)
        ends.append([flatten(tree) for tree in (state.trained, frozen, self._reference)])
        return state, metrics

    monkeypatch.setattr(Grpo, "step", step)
    whole = loop.train(config)
    trained, frozen, reference = ends[-1]
    assert len(ends) == 4 and {path.rpartition("/")[2] for path in trained} == {"lora_a", "lora_b"}
    assert all(np.asarray(x).any() for path, x in trained.items() if path.endswith("lora_b"))
    # With its second factors at 0 an adapter changes nothing: what is left is the base.
    assert set(reference) == set(trained)
    assert not any(np.asarray(x).any() for path, x in reference.items() if path.endswith("lora_b"))
    base = flatten(janus_jax.load(config.init_from, fused=False, scan_layers=True, progress=False).params)
    assert set(base) == {path for path in frozen if not path.endswith("lora_scale")}
    for path, x in base.items():
        np.testing.assert_array_equal(x, frozen[path], err_msg=path)
    lines = [line for line in read_metrics(config.workdir) if "train/reward" in line]
    assert 0 < lines[0]["train/kl"] < lines[-1]["train/kl"] and lines[0]["train/finite"] == 1

    half = dataclasses.replace(config, workdir=str(tmp_path / "half"), steps=2)
    first = loop.train(half)
    resumed = loop.train(dataclasses.replace(half, steps=4))
    for name in (CONFIG, WEIGHTS):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    assert (first / WEIGHTS).read_bytes() != (whole / WEIGHTS).read_bytes()
    assert not any(np.asarray(x).any() for path, x in ends[-1][2].items() if path.endswith("lora_b"))


# ---------------------------------------------------------------- what a step computes


def test_advantages_are_of_groups():
    rewards = np.array([1.0, 0, 0, 1, 5, 5, 5, 5, 1, np.nan, 0, 0])
    found = advantages(rewards, 4)
    assert (found.failed, found.equal) == (1, 1)
    np.testing.assert_array_equal(found.live, [1] * 4 + [0] * 8)
    deviation = np.std([1, 0, 0, 1], ddof=1)
    np.testing.assert_allclose(found.values[:4], np.array([0.5, -0.5, -0.5, 0.5]) / (deviation + 1e-4), rtol=1e-6)
    assert not found.values[4:].any() and found.spread == pytest.approx(deviation / 2)
    np.testing.assert_array_equal(advantages(rewards, 4, scale=False).values[:4], [0.5, -0.5, -0.5, 0.5])


def no_score_for_trees(pictures, prompts, metadata):
    """A reward that cannot judge one prompt, and takes all pictures of another one for equal."""
    assert all(set(each) == {"wanted"} for each in metadata)
    bright = pictures.mean((1, 2, 3)) / 255
    return [
        np.nan if prompt == "a tall tree" else 0.5 if prompt == "two cats" else x
        for prompt, x in zip(prompts, bright, strict=True)
    ]


@pytest.mark.slow
def test_groups_without_a_reward_or_a_difference_do_not_count(folders, tmp_path, one_device, capsys):
    """Of three prompts, one teaches; what is drawn of the others changes nothing, and is counted."""
    reward = RewardConfig(f"{__name__}:no_score_for_trees", workers=0, batch_size=1, tries=1)
    grpo = dataclasses.replace(GRPO, rewards=(reward,), draw_batch=6, epochs=1, updates=1)
    config = grpo_config(folders, tmp_path / "run", grpo, batch_size=12, steps=2)
    loop.train(config)
    for line in read_metrics(config.workdir):
        assert (line["train/failed_groups"], line["train/equal_groups"]) == (1, 1)
        assert line["train/finite"] == 1 and line["train/grad_norm"] > 0
    assert "pictures have no score after 1 try: it gave nan" in capsys.readouterr().err


def test_what_is_drawn_depends_on_the_seed_and_the_step():
    keys = {
        name: jax.random.key_data(rollout_keys(seed, step, 4)).tolist()
        for name, seed, step in (("a", 0, 0), ("again", 0, 0), ("later", 0, 1), ("other", 1, 0))
    }
    assert keys["a"] == keys["again"]
    flat = [tuple(key) for name in ("a", "later", "other") for key in keys[name]]
    assert len(set(flat)) == 12
    assert jax.random.key_data(rollout_keys(0, 0, 8)).tolist()[:4] == keys["a"]


# ---------------------------------------------------------------- prompts, and what is refused


@pytest.fixture(scope="module")
def processor(folders) -> Processor:
    return Processor.from_folder(folders["start"], tiny_config(folders, "run").model)


def test_prompts_go_round(folders, processor):
    read = read_prompts([folders["prompts"]], processor, 48, seed=3)
    assert [p.metadata for p in read.prompts] == [{"wanted": i} for i in range(3)]
    drawn = [p.text for step in range(6) for p in read.of_step(step, 2)]
    assert all(len(set(drawn[i : i + 3])) == 3 for i in range(0, 12, 3))
    assert drawn[4:6] == [p.text for p in read.of_step(2, 2)]
    other = read_prompts([folders["prompts"]], processor, 48, seed=4)
    assert [p.text for step in range(6) for p in other.of_step(step, 2)] != drawn


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("none.txt", "\n\n", "none.txt has no prompts"),
        ("long.txt", "a red house\n" + "old " * 99, "long.txt, line 2: the prompt of"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}', "bad.jsonl, line 2 is not a JSON object with a prompt"),
        ("empty.jsonl", '{"prompt": " "}', "empty.jsonl, line 1: the prompt must be text that says what to draw"),
        ("number.jsonl", '{"prompt": 3}', "number.jsonl, line 1: the prompt must be text that says what to draw"),
        ("cut.jsonl", '{"prompt": ', "cut.jsonl, line 1 is not valid JSON"),
    ],
)
def test_bad_prompts_are_named(name, text, told, processor, tmp_path):
    (tmp_path / name).write_text(text)
    with raises_one_line(told):
        read_prompts([str(tmp_path / name)], processor, 48, seed=0)


def test_bad_configs_are_named(folders, tmp_path):
    config = grpo_config(folders, tmp_path)
    assert validate(config) == []
    for changes, told in (
        ({"rewards": ()}, "grpo.rewards is empty"),
        ({"prompts": ()}, "grpo.prompts names no file"),
        ({"group": 1}, "grpo.group must be at least 2, got 1"),
        (
            {"speculate": 17},
            r"grpo.speculate must be 0 \(auto\), 1 \(off\) or a window of up to 16 codes, got 17",
        ),
        ({"group": 3}, "batch_size=8 must be a multiple of grpo.group=3"),
        ({"updates": 3}, "batch_size=8 must be a multiple of grpo.updates=3"),
        ({"temperature": 0.0}, "grpo.temperature must be above 0"),
        ({"clip": 1.5}, "grpo.clip must be above 0 and below 1"),
        ({"kl": -1.0}, "grpo.kl must be at least 0"),
        ({"top_p": 0.0}, "grpo.top_p must be above 0"),
    ):
        with raises_one_line(told):
            validate(dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, **changes)))
    for changes, told in (
        ({"init_from": "", "tokenizer": "t"}, "grpo starts from a model that draws"),
        ({"loss_chunk": 5}, "loss_chunk=5 does not divide the 16 codes"),
        ({"data": DataConfig(context=18)}, "data.context=18 has no room for a prompt"),
        ({"dpo": DpoConfig(pairs=("a",))}, "grpo and dpo exclude each other"),
        ({"grpo": None, "dpo": DpoConfig()}, "dpo.pairs names no folder"),
        ({"grpo": None, "dpo": DpoConfig(pairs=("a",), weights=(1.0, 2.0))}, "dpo.weights has 2 weights"),
        ({"grpo": None, "dpo": DpoConfig(pairs=("a",), beta=0.0)}, "dpo.beta must be a number above 0"),
    ):
        with raises_one_line(told):
            validate(dataclasses.replace(config, **changes))
    none = dataclasses.replace(config.grpo, loss="none")
    assert validate(dataclasses.replace(config, grpo=none))[0].startswith("grpo.guidance=2.0 is not used")
    unread = dataclasses.replace(config.data, text=("x",))
    assert validate(dataclasses.replace(config, data=unread)) == ["data.text is not read: grpo trains on its own"]
    with raises_one_line("make it a multiple of 16"):
        check_mesh(config, make_mesh({"fsdp": 8}))


def test_pairs_must_be_pairs(folders, processor, tmp_path):
    dpo = DpoConfig(pairs=(folders["generation"],))
    config = dataclasses.replace(grpo_config(folders, tmp_path), grpo=None, dpo=dpo)
    with raises_one_line("has generation samples; prepare pairs with train.prepare --kind preference"):
        Dpo(config, make_mesh({"fsdp": 1}, jax.devices()[:1]), processor)
