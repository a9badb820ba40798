"""Prepares random data for the config `debug`: `python -m examples.tiny`; then `python -m train.main --config debug`."""

import pathlib

from configs.debug import get_config
from examples.tiny.run import write_data


def main():
    config = get_config()
    folder = pathlib.Path(config.tokenizer).parent
    write_data(folder, model=config.model, context=config.data.context)
    print(f"wrote {folder}; train on it with python -m train.main --config debug")


if __name__ == "__main__":
    main()
