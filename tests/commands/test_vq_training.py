"""Training of the VQ tokenizer: losses and gradients against torch autograd, codes kept alive, bad input."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import janus_jax
from janus_jax.config import VQConfig
from janus_jax.model.vq import Quantizer, VQModel
from janus_jax.weights import checkpoint
from train.autoencoder.images import ImageFiles, read_ahead
from train.run.faults import AGAIN, Stopped
from train.vq import (
    KeptTraining,
    VQTrainConfig,
    draw,
    init_vq_state,
    main,
    reseed,
    save_vq,
    train_vq,
    usage,
    vq_train_step,
)

TINY = VQConfig(
    ch=4, ch_mult=(2,), num_res_blocks=1, z_channels=8, codebook_size=16, codebook_dim=4, grid=4, norm_groups=4
)
CONFIG = VQTrainConfig(model=TINY, steps=24, batch_size=8, learning_rate=3e-3, reseed_every=8, reseed_until=16)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Flat squares of a few grays, 4 x 4."""
    values = np.random.default_rng(0).uniform(-1, 1, (64, 2, 2, 1)).astype(np.float32)
    return np.repeat(values.repeat(2, axis=1).repeat(2, axis=2), 3, axis=-1)


@pytest.fixture(scope="module")
def trained(images):
    return train_vq(CONFIG, images, progress=False)


# ---------------------------------------------------------------- against torch


def torch_quantize(torch, z, embedding, beta):
    """VectorQuantizer.forward of the reference, written out: unit vectors, two losses, straight-through."""
    normalize = functools.partial(torch.nn.functional.normalize, dim=-1)
    z, embedding = normalize(z), normalize(embedding)
    codes = ((z[:, None] - embedding) ** 2).sum(-1).argmin(1)
    z_q = embedding[codes]
    codebook_loss = ((z_q - z.detach()) ** 2).mean()
    commitment_loss = beta * ((z_q.detach() - z) ** 2).mean()
    return z + (z_q - z).detach(), codes, codebook_loss, commitment_loss


def test_quantizer_against_autograd(rng):
    """Output, codes, losses, and gradients of z and of the codebook, of a loss that uses everything."""
    torch = pytest.importorskip("torch")
    z = rng.normal(size=(40, 4)).astype(np.float32) * rng.uniform(0.1, 10, (40, 1)).astype(np.float32)
    embedding = rng.normal(size=(16, 4)).astype(np.float32) * 3
    weights, beta = rng.normal(size=(40, 4)).astype(np.float32), 0.25

    theirs_z, theirs_e = (torch.tensor(x, requires_grad=True) for x in (z, embedding))
    out, codes, codebook_loss, commitment_loss = torch_quantize(torch, theirs_z, theirs_e, beta)
    ((out**2 * torch.tensor(weights)).sum() + 100 * (codebook_loss + commitment_loss)).backward()

    quantizer = Quantizer(TINY, jnp.float32)

    def loss_fn(z, embedding):
        q = quantizer.apply({"params": {"embedding": embedding}}, z, method="quantize")
        total = jnp.sum(q.z_q**2 * weights) + 100 * (q.codebook_loss + beta * q.commitment_loss)
        return total, q

    (_, q), grads = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))(z, embedding)
    np.testing.assert_array_equal(q.codes, codes.numpy())
    np.testing.assert_allclose(q.z_q, out.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(q.codebook_loss, codebook_loss.item(), rtol=1e-5)
    np.testing.assert_allclose(beta * q.commitment_loss, commitment_loss.item(), rtol=1e-5)
    for name, ours, theirs in (("z", grads[0], theirs_z.grad), ("codebook", grads[1], theirs_e.grad)):
        assert float(theirs.abs().max()) > 0.01
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_reconstruct_is_encode_and_decode(images):
    """What training sees is what sampling sees: the same codes, and the same images of them."""
    model, params = VQModel(TINY), init_vq_state(CONFIG).params
    run = jax.jit(lambda method, x: model.apply({"params": params}, x, method=method), static_argnums=0)
    reconstruction, q = run("reconstruct", images[:4])
    codes = run("encode", images[:4])
    np.testing.assert_array_equal(q.codes.reshape(4, -1), codes)
    np.testing.assert_allclose(reconstruction, run("decode", codes), atol=1e-5)


@pytest.mark.slow
def test_every_parameter_is_trained(trained):
    """What is before the quantizer straight through it, the codebook by its own loss."""
    before = jax.tree_util.tree_leaves_with_path(init_vq_state(CONFIG).params)
    still = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(before, jax.tree.leaves(trained[0]), strict=True)
        if np.array_equal(old, new)
    ]
    assert still == []


# ---------------------------------------------------------------- codes


@pytest.mark.slow
def test_reseeding_replaces_dead_codes_alone(images):
    state = init_vq_state(CONFIG)
    counts = jnp.zeros(TINY.codebook_size, jnp.int32).at[jnp.array([2, 5])].set(7)
    before = np.asarray(state.params["quantize"]["embedding"])
    z = VQModel(TINY).apply({"params": state.params}, images[:8], method="reconstruct")[1].z.reshape(-1, 4)
    rows = np.arange(TINY.codebook_size) + 3
    state = reseed(CONFIG, state._replace(counts=counts), images[:8], rows)
    after = np.asarray(state.params["quantize"]["embedding"])
    np.testing.assert_array_equal(after[[2, 5]], before[[2, 5]])
    dead = np.array([i for i in range(TINY.codebook_size) if i not in (2, 5)])
    np.testing.assert_allclose(after[dead], z[rows[dead]], atol=1e-5)
    assert not state.counts.any()


def test_draws_depend_on_seed_and_step_alone():
    first = draw(CONFIG, 5, 1000, 8)
    assert first.min() >= 0 and first.max() < 1000
    np.testing.assert_array_equal(first, draw(CONFIG, 5, 1000, 8))
    for other in (draw(CONFIG, 6, 1000, 8), draw(dataclasses.replace(CONFIG, seed=1), 5, 1000, 8)):
        assert (first != other).any()


def test_usage():
    uniform = usage(jnp.array([5, 5, 5, 5, 0, 0, 0, 0]))
    assert float(uniform["usage"]) == 0.5
    assert float(uniform["perplexity"]) == pytest.approx(4, rel=1e-5)
    assert float(usage(jnp.array([9, 0]))["perplexity"]) == pytest.approx(1)


@pytest.mark.slow
def test_counts_are_of_one_window(images):
    """Uses are counted over `reseed_every` steps: as many as there were vectors."""
    state = init_vq_state(CONFIG)
    for step in range(3):
        state, metrics = vq_train_step(CONFIG, state, images[:8])
        assert int(state.counts.sum()) == (step + 1) * CONFIG.batch_size * TINY.num_tokens
    assert float(metrics["usage"]) == float(np.mean(np.asarray(state.counts) > 0))


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_training_learns(trained, images):
    params, history = trained
    assert {name: values.shape for name, values in history.items()} == dict.fromkeys(
        ("reconstruction", "codebook", "commitment", "usage", "perplexity"), (CONFIG.steps,)
    )
    assert history["reconstruction"][-4:].mean() < 0.5 * history["reconstruction"][:4].mean()
    assert history["usage"][-1] > 0.5
    assert jax.tree.structure(params) == jax.tree.structure(init_vq_state(CONFIG).params)


@pytest.mark.slow
def test_training_is_deterministic(trained, images):
    params, history = train_vq(CONFIG, images, progress=False)
    jax.tree.map(np.testing.assert_array_equal, params, trained[0])
    jax.tree.map(np.testing.assert_array_equal, history, trained[1])


@pytest.mark.slow
def test_saved_folder_is_a_checkpoint(trained, images, tmp_path):
    params, _ = trained
    save_vq(tmp_path / "vq", TINY, params)
    loaded = janus_jax.load(tmp_path / "vq")
    assert loaded.config.gen_vision == TINY
    jax.tree.map(np.testing.assert_array_equal, loaded.params["gen_vision_model"], params)
    with pytest.raises(ValueError, match="exists"):
        save_vq(tmp_path / "vq", TINY, params)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: x[..., :1], r"must have shape \[N, 4, 4, 3\], got \[64, 4, 4, 1\]"),
        (lambda x: x[:0], r"must have shape .*, got \[0, 4, 4, 3\]"),
        (lambda x: x[0], "must have shape"),
        (lambda x: x * 255, r"must be in \[-1, 1\]"),
        (lambda x: x * np.nan, r"must be in \[-1, 1\]"),
    ],
)
def test_bad_images(images, make, message):
    with pytest.raises(ValueError, match=message):
        train_vq(CONFIG, make(images), progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"reseed_every": 0}, "reseed_every must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0, got 0.0"),
        ({"beta": float("nan")}, "beta must be a number above 0, got nan"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_divergence_is_said(images, monkeypatch):
    def diverged(config, state, batch):
        return state, {"reconstruction": np.float32(np.nan)}

    monkeypatch.setattr("train.vq.vq_train_step", diverged)
    with pytest.raises(ValueError, match=r"the loss is nan at step 8; lower learning_rate \(0\.003\)"):
        train_vq(CONFIG, images, progress=False)


# ---------------------------------------------------------------- command line

SIZES = ["--ch_mult=2"]
SIZES += [
    f"--{name}={getattr(TINY, name)}"
    for name in ("ch", "num_res_blocks", "z_channels", "codebook_size", "codebook_dim", "grid")
]


def write_images(folder, images):
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(np.rint((image + 1) * 127.5).astype(np.uint8)).save(folder / f"{index}.png")


def test_command_line(images, tmp_path, capsys):
    write_images(tmp_path / "images", images[:6])
    paths = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    # CONFIG, whose step is compiled already.
    run = {"norm_groups": 4} | {
        field: getattr(CONFIG, field)
        for field in ("steps", "batch_size", "learning_rate", "reseed_every", "reseed_until")
    }
    arguments = [*paths, *SIZES, *(f"--{name}={value}" for name, value in run.items())]
    assert main(arguments) == 0
    assert "reconstruction" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "params"]
    assert checkpoint.open_checkpoint(tmp_path / "out").config.gen_vision == TINY
    assert main(arguments) == 2
    assert "already has a checkpoint; choose another --out" in capsys.readouterr().err


def test_command_line_refuses(images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "images", images[:2])
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")

    def told(folder, *arguments):
        assert main(["--images", str(tmp_path / folder), "--out", str(tmp_path / "out"), *SIZES, *arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        return line

    assert "channels 4 x 2 must be a multiple of 32 norm groups" in told("images")
    assert "empty has no image files" in told("empty", "--norm_groups", "4")
    assert "nowhere is not a folder" in told("nowhere", "--norm_groups", "4")
    bad = told("images", "--norm_groups", "4")
    assert "1 of 3 images cannot be read" in bad and "bad.png" in bad
    assert "save_every must be at least 1, got 0" in told("images", "--norm_groups", "4", "--save_every", "0")
    assert not (tmp_path / "out").exists()


def test_image_files(images, tmp_path, capsys):
    write_images(tmp_path / "images", images[:3])
    files = ImageFiles(tmp_path / "images", 4)
    assert len(files) == 3 and files[0].dtype == np.float32
    np.testing.assert_allclose(np.stack([files[i] for i in range(3)]), images[:3], atol=1 / 127)
    (tmp_path / "images" / "._0.png").write_bytes(b"a Mac's note")
    assert len(ImageFiles(tmp_path / "images", 4)) == 3
    for i in range(300):
        (tmp_path / "images" / f"x{i}.png").hardlink_to(tmp_path / "images" / "1.png")
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    files = ImageFiles(tmp_path / "images", 4)
    np.testing.assert_array_equal(files[3], files[4])
    assert capsys.readouterr().err.count("skipped: ") == 1, "named once, and the next one in its place"


def test_images_are_read_when_they_are_drawn(images, tmp_path):
    """No more of them are in memory than a few batches, and their numbers are those of an array."""
    write_images(tmp_path / "images", images)
    files, held, most = ImageFiles(tmp_path / "images", 4), [], []

    class Counting(ImageFiles):
        def __getitem__(self, index):
            held.append(index)
            return super().__getitem__(index)

    steps = range(5, 25)
    counting = Counting(tmp_path / "images", 4)
    for number, (step, batch) in enumerate(read_ahead(counting, lambda step: draw(CONFIG, step, 64, 8), steps)):
        assert step == 5 + number
        np.testing.assert_array_equal(batch, np.stack([files[int(i)] for i in draw(CONFIG, step, 64, 8)]))
        most.append(len(held) - 8 * number)
    assert len(held) == 8 * len(steps) and max(most) <= 3 * 8


# ---------------------------------------------------------------- going on


# Ends itself before step 14 if it is told to.
KILLED = """
import os, sys
import train.vq as vq
step = vq.vq_train_step
def killed(config, state, batch):
    if int(state.step) == 13 and sys.argv[1] == "kill":
        os.kill(os.getpid(), 9)
    return step(config, state, batch)
vq.vq_train_step = killed
sys.exit(vq.main(sys.argv[2:]))
"""


def command(images, tmp_path) -> list[str]:
    write_images(tmp_path / "images", images)
    fields = ("steps", "batch_size", "learning_rate", "reseed_every", "reseed_until")
    arguments = ["--images", str(tmp_path / "images"), *SIZES, "--norm_groups=4", "--save_every=5"]
    return arguments + [f"--{name}={getattr(CONFIG, name)}" for name in fields]


def assert_same(*folders):
    first, *others = (janus_jax.load(folder).params["gen_vision_model"] for folder in folders)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_numbers(images, tmp_path, capsys, monkeypatch):
    arguments, out = command(images, tmp_path), ["--out", str(tmp_path / "out")]

    def interrupted(config, state, batch):
        if int(state.step) == 13:
            raise KeyboardInterrupt
        return vq_train_step(config, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr("train.vq.vq_train_step", interrupted)
        assert main([*arguments, *out]) == 130
    assert [path.name for path in (tmp_path / "out" / "training" / "state").iterdir()] == ["10"]
    assert main([*arguments, *out, "--seed=1"]) == 2
    assert "has a training with other settings (seed)" in capsys.readouterr().err
    assert main([*arguments, *out]) == 0
    assert "resuming after step 10" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out" / "training").exists()


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_numbers(images, tmp_path):
    arguments = command(images, tmp_path)
    for kill, name, code in (("kill", "out", -9), ("", "out", 0), ("", "whole", 0)):
        run = [sys.executable, "-c", KILLED, kill, *arguments, "--out", str(tmp_path / name)]
        done = subprocess.run(run, capture_output=True, timeout=500)
        assert done.returncode == code, done.stderr[-2000:]
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_a_training_that_is_told_to_end_saves_and_goes_on(images, tmp_path):
    kept = KeptTraining(tmp_path / "training", CONFIG, "", every=1000)
    with pytest.raises(Stopped, match="saved after step 7") as caught:
        train_vq(CONFIG, images, progress=False, kept=kept, told=lambda step: step == 7)
    assert caught.value.code == AGAIN and kept.latest == 7
    params, history = train_vq(CONFIG, images, progress=False, kept=kept)
    expected = train_vq(CONFIG, images, progress=False)
    jax.tree.map(np.testing.assert_array_equal, params, expected[0])
    jax.tree.map(np.testing.assert_array_equal, history, expected[1])


def test_a_damaged_state_is_one_line(images, tmp_path):
    kept = KeptTraining(tmp_path / "training", CONFIG, "", every=1000)
    (tmp_path / "training" / "state" / "9").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"state/9 cannot be read .*; delete .*training to start over") as caught:
        train_vq(CONFIG, images, progress=False, kept=kept)
    assert "\n" not in str(caught.value)
