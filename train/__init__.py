"""The three-stage training recipe of Janus-Pro: data, loss, step and loop."""

import sys
from importlib.util import find_spec

_missing = [name for name in ("grain", "optax") if find_spec(name) is None]
if _missing:
    _line = f"training needs {' and '.join(_missing)}: pip install -e '.[train]'"
    if sys.argv[0] == "-m":  # Python's word for `python -m train...` while it looks for the module
        print(f"error: {_line}", file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(_line)
