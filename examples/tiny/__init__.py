"""The smallest model and data for every path of training: for tests, benchmarks, and trying out changes.

from examples.tiny.run import tiny_config, write_checkpoint, write_data
from train.run.loop import train

start = write_checkpoint(folder / "start")                  # random parameters; the tokenizer is in the data
train(tiny_config(write_data(folder / "data"), folder / "run", init_from=str(start)))
"""
