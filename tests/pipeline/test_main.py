"""The command line: what it writes and prints, and one line for what it cannot do."""

import errno
import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from janus_jax.__main__ import main
from janus_jax.pipeline import JanusPipeline
from janus_jax.sharding import flatten
from janus_jax.weights import checkpoint, conversion
from tests.library.tiny_janus import GOLDEN, OTHER, QUESTION, SHORT, folder, janus  # noqa: F401

# ruff: noqa: F811

ROLES = "roles: <|User|> and <|Assistant|> (pro: <|User|> is a token)\n"


def test_generate(folder, janus, tmp_path, capfd):
    out = tmp_path / "new" / "images"
    prompts = ["--prompt", SHORT, "--prompt", OTHER]
    assert main(["generate", "--model", str(folder), *prompts, "--n", "1", "--seed", "3", "--out", str(out)]) == 0
    shown = capfd.readouterr()
    names = ["000_000.png", "001_000.png", "sheet.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert shown.out.splitlines() == [str(out / name) for name in names] and shown.err == ROLES
    drawn = [Image.open(out / name) for name in names]
    for image, expected in zip(drawn, janus.generate_images([SHORT, OTHER], seed=3), strict=False):
        np.testing.assert_array_equal(image, expected)
    assert drawn[2].size == (16, 32), "a column of two: one row a prompt"


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (
            "--guidance 2 --temperature 0 --top-k 3 --top-p 0.5 --batch-size 4 --speculate off",
            (2.0, 0.0, 3, 0.5, 4, False),
        ),
        ("", (5.0, 1.0, None, 1.0, None, "auto")),
    ],
)
def test_settings_arrive(folder, janus, tmp_path, monkeypatch, arguments, settings):
    seen = []

    def generate(self, prompts, n, cfg_weight, temperature, top_k, seed, *, top_p, batch_size, speculate):
        seen.append((cfg_weight, temperature, top_k, top_p, batch_size, speculate))
        return [Image.new("RGB", (4, 4))] * n

    monkeypatch.setattr(type(janus), "generate_images", generate)
    command = ["generate", "--model", str(folder), "--prompt", SHORT, "--n", "5", "--out", str(tmp_path)]
    assert main([*command, *arguments.split()]) == 0
    assert seen == [settings]
    assert len(list(tmp_path.glob("000_00?.png"))) == 5
    assert Image.open(tmp_path / "sheet.png").size == (12, 8), "about square for one prompt"


def test_chat(folder, janus, capfd):
    assert main(["chat", "--model", str(folder), QUESTION, "--max-new-tokens", "20", "--system", ""]) == 0
    shown = capfd.readouterr()
    assert shown.out.strip() == janus.chat(QUESTION, max_new_tokens=20, system_prompt="")
    assert shown.out.endswith("\n") and shown.err == ROLES


def test_chat_about_images(folder, janus, tmp_path, capfd, monkeypatch):
    """The pictures reach the model, in order."""
    paths = [str(tmp_path / f"{level}.png") for level in (0, 255)]
    for path in paths:
        Image.new("RGB", (8, 8), (int(pathlib.Path(path).stem),) * 3).save(path)
    seen = []
    monkeypatch.setattr("janus_jax.pipeline.compile_tokens", lambda *args, **kwargs: None)
    monkeypatch.setattr("janus_jax.pipeline.embed_prompt", lambda *args: seen.append(np.asarray(args[-1])) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(
            [
                "chat",
                "--model",
                str(folder),
                QUESTION,
                "--max-new-tokens",
                "4",
                "--image",
                paths[0],
                "--image",
                paths[1],
            ]
        )
    assert seen[0].shape[:2] == (1, 2) and seen[0][0].mean(axis=(1, 2, 3)).tolist() == [-1, 1]


def test_info_of_every_layout(folder, tmp_path, capfd):
    converted, transformers = tmp_path / "converted", tmp_path / "transformers"
    conversion.from_torch(folder, converted)
    conversion.to_torch(folder, transformers, "transformers", note=lambda text: None)
    params = checkpoint.load_params(folder, as_numpy=True)
    total = sum(array.size for array in flatten(params).values())
    shown = {}
    for kind, path in (("original", folder), ("converted", converted), ("transformers", transformers)):
        assert main(["info", "--model", str(path)]) == 0
        first, *rest = capfd.readouterr().out.splitlines()
        assert first.startswith(f"{path}: {kind} layout")
        assert rest[0].startswith("  roles: <|User|> and <|Assistant|> (pro: ")
        shown[kind] = [line.split() for line in rest[1:]]
    counts = {words[0]: words[1] for words in shown["original"]}
    for part, arrays in params.items():
        assert counts[part] == f"{sum(array.size for array in flatten(arrays).values()):,}"
    assert counts["total"] == f"{total:,}"
    assert ["in", "float32", f"{total * 4 / 2**30:.2f}", "GiB"] in shown["original"]
    assert shown["converted"] == shown["original"] == shown["transformers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --model {tmp}/absent --prompt cat --out {tmp}/out", "absent is neither a folder nor a hub id"),
        ("generate --model {tmp}/empty --prompt cat --out {tmp}/out", "config.json does not exist"),
        ("generate --model {model} --prompt= --out {tmp}/out", "the prompt must be text that says what to draw, got"),
        ("generate --model {model} --prompt cat --n 0 --out {tmp}/out", "n must be ..., got 0"),
        ("generate --model {model} --prompt cat --top-p 1.5 --out {tmp}/out", "top_p must be ..., got 1.5"),
        ("generate --model {model} --prompt cat --top-p nan --out {tmp}/out", "top_p must be ..., got nan"),
        ("generate --model {model} --prompt cat --top-k 0 --out {tmp}/out", "top_k must be ..., got 0"),
        ("generate --model {model} --prompt cat --temperature -1 --out {tmp}/out", "temperature must be ..., got -1.0"),
        ("generate --model {model} --prompt cat --guidance nan --out {tmp}/out", "cfg_weight must be ..., got nan"),
        ("generate --model {model} --prompt cat --batch-size 0 --out {tmp}/out", "batch_size must be ..., got 0"),
        ("generate --model {model} --prompt cat --seed -1 --out {tmp}/out", "seed must be ..., got -1"),
        ("generate --model {model} --prompt cat --mesh fsdp --out {tmp}/out", "got 'fsdp'"),
        ("generate --model {model} --prompt cat --mesh rows=8 --out {tmp}/out", "mesh axis 'rows' is unknown"),
        ("generate --model {model} --prompt cat --mesh fsdp=3 --out {tmp}/out", "does not match the 8 devices"),
        ("generate --model {model} --prompt cat --mesh tensor=8 --out {tmp}/out", "does not divide the model"),
        ("generate --model {model} --prompt cat --roles robot --out {tmp}/out", "unknown roles 'robot'"),
        ("generate --model {model} --prompt cat --out {tmp}/file", "file"),
        ("generate --model {model} --prompt cat --out {tmp}/file/out", "file/out"),
        ("generate --model {model} --prompt cat --out /proc", "/proc"),
        ("chat --model {model} What --image {tmp}/absent.png", "absent.png"),
        ("chat --model {model} What --image {tmp}/file", "not an image"),
        ("chat --model {model} What --image {tmp}/empty", "found a folder"),
        ("chat --model {model} What --top-p 0", "top_p must be ..., got 0.0"),
        ("chat --model {model} What --max-new-tokens 0", "max_new_tokens must be ..., got 0"),
        ("chat --model {model} What --max-new-tokens 4 --seed 99999999999", "seed must be ..., got 99999999999"),
        ("chat --model {model} What", "512 new tokens exceeds the model's 512 positions"),
        ("chat --model {model} <image_placeholder>", "there are 0 images"),
        ("info --model {tmp}/absent", "absent is neither"),
        ("info --model {tmp}/file", "file is neither"),
    ],
)
def test_one_line_for_bad_input(folder, tmp_path, capfd, monkeypatch, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no image")
    for name in ("generate_codes", "embed_prompt"):
        monkeypatch.setattr(f"janus_jax.pipeline.{name}", lambda *args, **kwargs: pytest.fail("the model was run"))
    assert main([word.format(tmp=tmp_path, model=folder) for word in arguments.split()]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and shown.err.endswith("\n")
    assert all(words in shown.err for words in message.split("..."))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["/proc", "{tmp}/file"])
def test_unwritable_folder_is_found_out_before_loading(folder, tmp_path, capfd, monkeypatch, out):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("janus_jax.__main__.load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    assert main(["generate", "--model", str(folder), "--prompt", "cat", "--out", out.format(tmp=tmp_path)]) == 2


def test_a_full_disk_leaves_no_picture(folder, janus, tmp_path, capfd, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(janus), "generate_images", lambda *args, **kwargs: [Image.new("RGB", (4, 4))])
    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out"
    assert main(["generate", "--model", str(folder), "--prompt", SHORT, "--out", str(out)]) == 2
    told = capfd.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert "No space left on device" in told and "000_000.png" in told
    assert not out.exists()


def test_missing_tokenizer(tmp_path, capfd):
    assert main(["chat", "--model", str(GOLDEN), "What"]) == 2
    assert capfd.readouterr().err == f"error: {GOLDEN} has no tokenizer.json, which is needed to chat\n"


def test_out_of_memory_and_interrupts(capfd, monkeypatch):
    from janus_jax.sampling.memory import OutOfMemory

    for error, code, line in (
        (OutOfMemory("too large"), 2, "error: too large"),
        (KeyboardInterrupt, 130, "interrupted"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("janus_jax.__main__.load", fail)
        assert main(["chat", "--model", "any", "What"]) == code
        assert capfd.readouterr().err == line + "\n"


@pytest.mark.parametrize("arguments", [[], ["paint"], ["info"], ["generate", "--model", "m", "--out", "o"]])
def test_usage(arguments, capfd):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m janus_jax" in capfd.readouterr().err


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_answers_of_any_characters(janus, encoding, monkeypatch):
    """As `PYTHONIOENCODING=cp1252 python -m janus_jax chat > file`: what the encoding lacks is written as escapes."""
    written, answer = io.BytesIO(), " caf\xe9 \u732b \U0001f642 \udcff end"
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding, errors="strict"))
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(io.BytesIO(), encoding, errors="strict"))
    monkeypatch.setattr("janus_jax.__main__.load", lambda *args, **kwargs: janus)
    monkeypatch.setattr(JanusPipeline, "stream_chat", lambda *args, **kwargs: iter([answer[:6], answer[6:]]))
    assert main(["chat", "--model", "m", QUESTION]) == 0
    expected = answer.strip().encode(encoding, "backslashreplace")
    assert written.getvalue() == expected + b"\n"
    assert expected.endswith(b"\\udcff end") and (encoding == "utf-8") == ("\u732b".encode() in expected)


def test_as_a_program():
    command = [sys.executable, "-m", "janus_jax", "info", "--model"]
    settings = {"capture_output": True, "text": True, "env": {**os.environ, "JAX_PLATFORMS": "cpu"}}
    done = subprocess.run([*command, str(GOLDEN)], **settings)
    assert done.returncode == 0 and done.stderr == ""
    assert "original layout" in done.stdout and "language_model" in done.stdout
