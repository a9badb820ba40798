"""Imports every module of an installed janus_jax, loads the checkpoint that is given, draws and answers."""

import importlib
import pathlib
import pkgutil
import sys

import janus_jax

assert "site-packages" in janus_jax.__file__, f"not the installed package: {janus_jax.__file__}"
EXTRAS = ("janus_jax.lmms_eval.", "janus_jax.serving.api.")  # rooms whose packages are extras

names = [module.name for module in pkgutil.walk_packages(janus_jax.__path__, "janus_jax.")]
for name in names:
    if not name.endswith("__main__") and not name.startswith(EXTRAS):
        importlib.import_module(name)
assert "torch" not in sys.modules and "optax" not in sys.modules and "train" not in sys.modules

janus = janus_jax.load(sys.argv[1])
(image,) = janus.generate_images("a red house", seed=1)
image.save("image.png")
assert pathlib.Path("image.png").stat().st_size > 0 and len(image.getcolors(1 << 24)) > 1
answer = janus.chat("What is it?", images=["image.png"], max_new_tokens=4)
assert isinstance(answer, str)
print(f"{len(names)} modules, an image of {image.size} and the answer {answer!r}")
