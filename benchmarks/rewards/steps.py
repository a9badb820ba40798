"""Where the time of GRPO's steps goes: a real run on random weights, with rewards in a worker process."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import tempfile

from benchmarks.common import runs as common
from benchmarks.scaling import shortened


def step_table(args: argparse.Namespace, seconds: float) -> common.Table:
    """A row for each of `args.steps` steps of `args.parts` groups of pictures; judging takes `seconds` a picture.

    The first step compiles.
    """
    from examples.tiny.run import write_checkpoint
    from examples.tiny.tokenizer import write_tokenizer
    from train.config import DataConfig, GrpoConfig, OptimizerConfig, RewardConfig, TrainConfig
    from train.run.loop import train
    from train.run.metrics import read_metrics

    config = shortened(args.preset, args.layers)
    vision = dataclasses.replace(config.vision, layers=min(args.layers, config.vision.layers))
    config, codes = dataclasses.replace(config, vision=vision), config.gen_vision.num_tokens
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = write_checkpoint(folder / "model", config)
        write_tokenizer(model, image_size=vision.image_size, num_image_tokens=vision.num_patches)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"a red house {i}"}) + "\n" for i in range(args.parts)))
        reward = RewardConfig("benchmarks.rewards.judges:waits", options=(f"seconds={seconds}",))
        grpo = GrpoConfig(
            prompts=(str(prompts),), rewards=(dataclasses.replace(reward, batch_size=args.pictures),),
            group=args.pictures, draw_batch=args.pictures, speculate=1,
        )  # fmt: skip
        run = TrainConfig(
            name="grpo", workdir=str(folder / "run"), model=config, stage=2, grpo=grpo, init_from=str(model),
            steps=args.steps, batch_size=args.pictures * args.parts,
            data=DataConfig(context=codes + 64, workers=0), optimizer=OptimizerConfig(learning_rate=1e-6),
            compute_dtype="float32", remat="none", loss_chunk=codes // 4, log_every=1, save_every=args.steps,
        )  # fmt: skip
        train(run)
        lines = [line for line in read_metrics(run.workdir) if "train/drawing_seconds" in line]
    rows: common.Table = [
        ("step", "drawing s", "waiting for rewards s", "log-probabilities and update s", "pictures/s")
    ]
    for line in lines:
        whole, drawing, waiting = (
            line[f"train/{name}"] for name in ("seconds_per_step", "drawing_seconds", "waiting_seconds")
        )
        told = (drawing, waiting, whole - drawing - waiting, run.batch_size / whole)
        rows.append((str(line["step"]), *map(common.cell, told)))
    return rows
