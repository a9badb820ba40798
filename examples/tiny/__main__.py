"""Prepares random data for the config `debug`: `python -m examples.tiny`, for `python -m train.main`."""

import pathlib

from examples.tiny.run import write_data
from train.overrides import load_config


def main():
    config = load_config("debug")
    folder = pathlib.Path(config.tokenizer).parent
    write_data(folder, model=config.model, context=config.data.context)
    print(f"wrote {folder}; train on it with python -m train.main --config debug")


if __name__ == "__main__":
    main()
