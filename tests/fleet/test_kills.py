"""Commands that prepare together, one of them killed at random moments: the bytes of one that nothing disturbs."""

import json
import os
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
from train.data.prepared import META

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


def finished(out: pathlib.Path) -> bool:
    return (out / META).exists() and json.loads((out / META).read_text())["finished"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    alone = start(options, out)
    told = alone.communicate(timeout=900)
    assert alone.returncode == 0, told
    return content(out)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_killed_and_started_again(options, tmp_path, whole, parts):
    """One of the parts is killed at a random moment, and started again; now and then all are, in another number."""
    rng, kills, rounds = random.Random(parts), 0, 0
    while kills < KILLS:
        rounds += 1
        out, count, running = tmp_path / f"out{rounds}", parts, []
        while not finished(out):
            if not running:
                running = [start(options, out, "--part", f"{index}/{count}") for index in range(count)]
            time.sleep(rng.uniform(0.5, 8))
            # What has ended by itself has done its share.
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                told = process.communicate()
                assert process.returncode == 0, told
            running = [process for process in running if process not in ended]
            if running and kills < KILLS:
                victim = rng.choice(running)
                victim.send_signal(signal.SIGKILL)
                victim.communicate()
                kills += victim.returncode == -signal.SIGKILL
                running.remove(victim)
                if rng.random() < 0.7:
                    running.append(start(victim.args[3:-4], out, *victim.args[-2:]))
                else:
                    for process in running:
                        process.kill()
                        process.communicate()
                    running, count = [], rng.choice([1, 2, 3, parts])
        for process in running:
            process.communicate(timeout=600)
        assert content(out) == whole
    print(f"{kills} kills, {rounds} folders")


@pytest.mark.slow
def test_workers_of_ray_that_are_killed(options, tmp_path, whole):
    pytest.importorskip("ray")
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < KILLS:
        rounds += 1
        out = tmp_path / f"out{rounds}"
        driver = start(options, out, "--engine", "ray")
        while driver.poll() is None:
            time.sleep(rng.uniform(0.5, 6))
            workers = [child for child in descendants(driver.pid) if "ray::_shard" in name_of(child)]
            if workers and kills < KILLS:
                os.kill(rng.choice(workers), signal.SIGKILL)
                kills += 1
        told = driver.communicate()
        assert driver.returncode == 0, told
        assert "kept                                3,000" in told[0]
        assert content(out) == whole
    print(f"{kills} kills, {rounds} folders")


def name_of(process: int) -> str:
    try:
        return pathlib.Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def descendants(process: int) -> list[int]:
    try:
        told = pathlib.Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    children = [int(word) for word in told.split()]
    return [*children, *(each for child in children for each in descendants(child))]
