"""What commands write to a store is what they write to a disk; and what cannot be written is one line at once."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

import janus_jax
from examples.tiny.run import MODEL, write_checkpoint, write_data
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.__main__ import main as janus_main
from janus_jax.io.store_access import SCHEMES
from janus_jax.io.whole.ownership import MARK
from tests.commands.test_vq_training import command, write_images
from train import finetune, inspect, vq


@pytest.mark.slow
def test_a_vq_training_in_a_store_goes_on_to_the_numbers_of_a_disk(store, tmp_path, monkeypatch, capsys):
    folder, _ = store
    images = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 3)).astype(np.float32)
    arguments, out = command(images, tmp_path), folder / "vq"

    def interrupted(config, state, batch, step=vq.vq_train_step):
        if int(state.step) == 13:
            raise KeyboardInterrupt
        return step(config, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(vq, "vq_train_step", interrupted)
        assert vq.main([*arguments, "--out", str(out)]) == 130
    saved = out / "training" / "checkpoints"
    assert {path.name for path in saved.iterdir()} == {"10"} and not (out / "config.json").exists()
    assert vq.main([*arguments, "--out", str(out), "--seed=1"]) == 2
    assert "has a training with other settings (seed)" in capsys.readouterr().err
    assert vq.main([*arguments, "--out", str(out)]) == 0
    assert "resuming after step 10" in capsys.readouterr().out
    assert vq.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    there, here = (janus_jax.load(str(place)).params["gen_vision_model"] for place in (out, tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, there, here)
    assert not (out / "training").exists()
    assert vq.main([*arguments, "--out", str(out)]) == 2
    assert "already has a checkpoint; choose another --out" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    write_tokenizer(folder, image_size=MODEL.vision.image_size, num_image_tokens=MODEL.vision.num_patches)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_an_adapter_is_tuned_and_used_in_a_store(store, model, tmp_path, capsys):
    folder, _ = store
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "caption": f"picture {i}"}) for i in range(6)]
    (tmp_path / "photos.jsonl").write_text("\n".join(lines))
    how = {"steps": 2, "batch_size": 2, "rank": 2, "targets": ("o_proj",), "prompts": (), "progress": False}
    made = [
        finetune.finetune(model, tmp_path / "photos.jsonl", "generation", out, **how)
        for out in (folder / "tuned", tmp_path / "tuned")
    ]
    for path in [path for path in made[1].iterdir() if path.name != MARK]:
        assert (made[0] / path.name).read_bytes() == path.read_bytes(), path.name
    drawn = ["generate", "--model", model, "--adapter", str(made[0]), "--prompt", "a picture", "--n", "2"]
    assert janus_main([*drawn, "--out", str(folder / "drawn")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}/drawn/sheet.png"
    assert janus_main([*drawn, "--out", str(tmp_path / "drawn")]) == 0
    for path in (tmp_path / "drawn").iterdir():
        assert (folder / "drawn" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_page_of_samples_is_written_to_a_store(store, tmp_path):
    samples = write_data(tmp_path / "data", count=4)["text"]
    for page in (f"{store[0]}/page.html", str(tmp_path / "page.html")):
        assert inspect.main([samples, "--html", page]) == 0
    assert (store[0] / "page.html").read_bytes() == (tmp_path / "page.html").read_bytes()


@pytest.mark.parametrize("store", ["gs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_where_nothing_can_be_written_is_one_line_before_any_work(store, model, tmp_path, capsys):
    folder, proxy = store
    write_images(tmp_path / "images", np.zeros((2, 4, 4, 3), np.float32))
    (tmp_path / "photos.jsonl").write_text(json.dumps({"image": "images/0.png", "caption": "a picture"}))
    commands = (
        lambda out: vq.main(
            ["--images", str(tmp_path / "images"), "--ch=4", "--ch_mult=2", "--grid=4", "--norm_groups=4", "--out", out]
        ),
        lambda out: janus_main(["generate", "--model", model, "--prompt", "a picture", "--out", out]),
        lambda out: finetune.main(
            ["--model", model, "--data", str(tmp_path / "photos.jsonl"), "--kind", "generation", "--out", out]
        ),
    )
    for run in commands:
        for out, told in (
            (f"{str(folder)[:5]}no-such-bucket/out", "there is no bucket no-such-bucket"),
            (f"{folder}/out", "these credentials may not do this"),
        ):
            with proxy.failing(kinds=("403",) if "credentials" in told else (), methods=("POST", "PUT")):
                assert run(out) == 2
            error = capsys.readouterr().err.splitlines()
            assert len([line for line in error if line.startswith("error: ")]) == 1 and told in error[-1], error
        assert run("az://bucket/out") == 2
        assert f"use a local path, or one of {SCHEMES[0]}://" in capsys.readouterr().err
