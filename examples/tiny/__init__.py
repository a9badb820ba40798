"""The smallest model and data that every path of training takes: for tests and benchmarks, and to try a change in.

from examples.tiny.run import tiny_config, write_checkpoint, write_data
from train.run.loop import train

start = write_checkpoint(folder / "start")                  # random parameters, a tokenizer is among the data
train(tiny_config(write_data(folder / "data"), folder / "run", init_from=str(start)))
"""
