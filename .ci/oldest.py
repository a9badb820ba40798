"""Prints pip constraints: of each dependency in pyproject.toml that has a lower bound, that version."""

import pathlib
import re
import tomllib

project = tomllib.loads(pathlib.Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in (*project["dependencies"], *(x for extra in ("train", "parquet", "digits") for x in extras[extra])):
    if found := re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement):
        print("==".join(found.groups()))
        if found[1] == "jax":
            print(f"jaxlib=={found[2]}")
