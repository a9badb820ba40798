"""Compares the wheel that is given with the checkout: the package's modules, `py.typed` and the page are in it."""

import pathlib
import sys
import zipfile

root = pathlib.Path(__file__).parents[1]
files = [*(root / "janus_jax").rglob("*.py"), *(root / "janus_jax" / "serving" / "page").iterdir()]
wanted = {path.relative_to(root).as_posix() for path in files} | {"janus_jax/py.typed"}
found = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
if wanted != found:
    sys.exit(f"the wheel lacks {sorted(wanted - found)} and has {sorted(found - wanted)} besides")
print(f"{len(found)} files in the wheel")
