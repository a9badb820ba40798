"""Commands that prepare together, one of them killed at random moments: the bytes of one that nothing disturbs."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from examples.tiny.tokenizer import write_tokenizer
from janus_jax.config import get_preset
from janus_jax.weights import checkpoint
from janus_jax.weights.torch_weights import abstract_params
from tests.data.test_prepare import content
from tests.raw.test_sources import lines, png
from tests.several import environment

CONFIG = get_preset("janus_tiny")
KILLS = 20


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(CONFIG))
    checkpoint.save(folder / "model", CONFIG, params)
    write_tokenizer(folder / "model", image_size=CONFIG.vision.image_size)
    for i in range(60):
        (folder / f"{i}.png").write_bytes(png((i * 4, 255 - i * 4, 90), (400 + i, 300)))
    records = ({"image": f"{i % 60}.png", "caption": f"Cat {i}. Tall."} for i in range(3000))
    path = lines(folder / "c.jsonl", *records)
    given = ["--kind", "generation", "--source", path, "--model", folder / "model", "--shard-size", "75"]
    return [*given, "--batch-size", "8", "--workers", "1"]


def start(options, out: pathlib.Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "train.prepare", *options, "--out", out, *more]
    return subprocess.Popen(
        [str(word) for word in command], env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_killed_and_started_again_in_other_numbers(options, tmp_path, parts):
    alone = start(options, tmp_path / "whole")
    begun = time.monotonic()
    assert alone.wait(600) == 0, alone.stderr.read()
    seconds = time.monotonic() - begun
    rng, kills, rounds = random.Random(parts), 0, 0
    while kills < KILLS // 2:
        rounds += 1
        out = tmp_path / f"out{rounds}"
        count = parts
        while not (out / "prepared.json").exists() or '"finished": false' in (out / "prepared.json").read_text():
            running = [start(options, out, "--part", f"{i}/{count}") for i in range(count)]
            victim = rng.choice(running)
            time.sleep(rng.uniform(0.2, 1.0) * seconds)
            if victim.poll() is None:
                victim.send_signal(signal.SIGKILL)
                kills += 1
            for process in running:
                told = process.communicate(timeout=600)
                assert process.returncode in (0, -signal.SIGKILL), told
            count = rng.choice([1, 2, 3, parts])
        assert content(out) == content(tmp_path / "whole")
