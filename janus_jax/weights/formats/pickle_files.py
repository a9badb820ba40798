"""Reads files of torch.save without torch and without running code: a zip archive of a pickle and the storages.

A pickle is a program for a small stack machine whose operations may call any function. The machine here knows only the
operations that build dicts of tensors and calls nothing: other objects in a training checkpoint become placeholders
without content. Size, operations and keys are bounded before anything is built.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickletools
from typing import Any

import ml_dtypes
import numpy as np

from janus_jax.io.files import open_regular
from janus_jax.io.messages import one_line
from janus_jax.weights.formats.stored_tensor import Record, Tensor, extent
from janus_jax.weights.formats.zip_records import NoZip, read_records

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MAX_PICKLE = 16 << 20  # bytes; a tensor takes about 150
_MAX_OPERATIONS = 500_000  # a tensor takes about 30
_MAX_AXES, _MAX_INTEGER = 32, 1 << 62
# Which of a training checkpoint's sets of parameters is read, as in LlamaGen's own scripts: averaged ones first.
_SETS = ("ema", "model", "state_dict")

_STORAGES = {
    "BFloat16Storage": ml_dtypes.bfloat16,
    "HalfStorage": np.float16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Other classes and functions in training checkpoints; only their names are kept.
_INERT = {
    ("argparse", "Namespace"),
    ("collections", "defaultdict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "list", "dict", "int", "float")),
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str  # its name inside the archive
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or function that the pickle refers to; it is never imported."""

    module: str
    name: str


class _Inert:
    """Placeholder for an object whose content is dropped: a list, a Namespace, a set."""


class _Tuple(tuple):
    """A tuple that is nested no deeper than a tensor's arguments."""

    depth: int


def open_pickle(path: pathlib.Path, note: Any = lambda text: None) -> dict[str, Tensor]:
    """Every tensor in the torch.save file `path`, by name; no code in it is run.

    Args:
      note: called with a sentence that says which set of tensors is read if a training checkpoint has several.
    Raises: OSError; ValueError if it is not such a file, is damaged, or contains more than tensors.
    """
    with open_regular(path) as file:
        try:
            records = _without_folder(read_records(file))
            if "data.pkl" not in records:
                raise ValueError("it is a zip archive without data.pkl")
            if "byteorder" in records and _read(path, file, records["byteorder"], 16) != b"little":
                raise ValueError("its byte order is not little-endian")
            content = _run(_read(path, file, records["data.pkl"], _MAX_PICKLE))
            state, taken = _choose(content)
            tensors = {name: _locate(path, name, tensor, records) for name, tensor in state.items()}
        except NoZip:
            raise ValueError(
                f"{one_line(path)} is truncated, or in the format from before torch 1.6; download it again, or save it "
                "with a newer torch"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"{one_line(path)} is not a plain torch state dict ({one_line(error, 500)}); nothing in it was run"
            ) from None
    if taken:
        note(f"{one_line(path)}: {taken}")
    return tensors


def _without_folder(records: dict[str, Record]) -> dict[str, Record]:
    """`records` with the name of their common folder removed."""
    folders = {name.partition("/")[0] for name in records}
    if len(folders) > 1:
        raise ValueError("it is a zip archive of several folders")
    return {name.partition("/")[2]: record for name, record in records.items()}


def _read(path: pathlib.Path, file, record: Record, limit: int) -> bytes:
    if record.size > limit:
        raise ValueError(f"a record of it has {record.size:,} bytes, more than the limit of {limit:,}")
    # Read as a tensor, so that its checksum is verified.
    return Tensor(path, np.dtype(np.uint8), (record.size,), (1,), record.start, record).view().tobytes()


def _choose(content: Any) -> tuple[dict[str, _Tensor], str]:
    """The tensors in a file's content, and a sentence on which they are if there was a choice."""
    if not isinstance(content, dict):
        raise ValueError("it is not a dict of tensors")
    sets = [name for name in _SETS if name in content and not isinstance(content[name], _Tensor | None)]
    sets = [name for name in sets if content[name] != {}]
    taken = ""
    state = content
    if sets:
        state = content[sets[0]]
        if len(sets) > 1:
            taken = f"it has {' and '.join(sets)}; {sets[0]} is read"
        if not isinstance(state, dict):
            raise ValueError(f"its {sets[0]!r} is not a dict of tensors")
    others = [
        one_line(name) for name, value in state.items() if not isinstance(value, _Tensor) or type(name) is not str
    ]
    if others:
        where = f"its {sets[0]!r}" if sets else "it"
        raise ValueError(f"{where} contains more than tensors: {', '.join(others[:4])}")
    return state, taken


def _locate(path: pathlib.Path, name: str, tensor: _Tensor, records: dict[str, Record]) -> Tensor:
    storage, label = tensor.storage, one_line(name)
    record = records.get(f"data/{storage.key}")
    if record is None:
        raise ValueError(f"the storage of {label} is missing")
    if storage.count * storage.dtype.itemsize != record.size:
        raise ValueError(f"the storage of {label} has {record.size:,} bytes, not its {storage.count:,} elements")
    if tensor.offset + extent(tensor.shape, tensor.strides) > storage.count:
        raise ValueError(f"{label} extends beyond its storage")
    start = record.start + tensor.offset * storage.dtype.itemsize
    return Tensor(path, storage.dtype, tensor.shape, tensor.strides, start, record)


# ---------------------------------------------------------------- the machine


def _run(data: bytes) -> Any:
    """The object that the pickle `data` builds, from dicts, strings, numbers, tuples, tensors and placeholders only."""
    machine = _Machine()
    try:
        position = 0
        for number, (operation, argument, position) in enumerate(pickletools.genops(data)):  # noqa: B007
            if number >= _MAX_OPERATIONS:
                raise ValueError(f"its pickle has more than {_MAX_OPERATIONS:,} operations")
            step = _STEPS.get(operation.name)
            if step is None:
                raise ValueError(f"its pickle has the operation {operation.name}, which state dicts do not need")
            step(machine, argument)
    except (IndexError, KeyError, UnicodeError):
        raise ValueError("its pickle is damaged") from None
    if len(machine.stack) != 1 or machine.marks or position + 1 != len(data):
        raise ValueError("its pickle is damaged")
    return machine.stack[0]


class _Machine:
    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any):
        self.stack.append(value)

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values, self.stack[mark:] = self.stack[mark:], []
        return values

    def push_number(self, value: int):
        if not -_MAX_INTEGER < value < _MAX_INTEGER:
            raise ValueError("its pickle has an integer of more than 62 bits")
        self.push(value)

    def push_tuple(self, values: list[Any]):
        made = _Tuple(values)
        made.depth = 1 + max((value.depth for value in values if isinstance(value, _Tuple)), default=0)
        # A tensor's arguments have depth 2; deeper tuples are never walked.
        self.push(made if made.depth <= 3 and len(made) <= _MAX_AXES else _Inert())

    def set_items(self, pairs: list[Any]):
        if len(pairs) % 2:
            raise IndexError
        target = self.stack[-1]
        if isinstance(target, _Inert):
            return
        if type(target) is not dict:
            raise ValueError("its pickle sets items of something that is not a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int):
                raise ValueError(f"a dict in it has keys that are neither strings nor integers: {_kind(key)}")
            if key in target:
                raise ValueError(f"a dict in it has the key {one_line(key)} twice")
            target[key] = value

    def add_items(self, values: list[Any]):
        if type(self.stack[-1]) is not _Inert:
            raise ValueError("its pickle appends to something that is not a list")

    def ask(self, module: str, name: str):
        tensors = [("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")]
        known = (module, name) in (*tensors, ("collections", "OrderedDict")) or (module, name) in _INERT
        if not known and not (module == "torch" and name in _STORAGES):
            raise ValueError(f"it asks for {one_line(f'{module}.{name}')}")
        self.push(_Name(module, name))

    def ask_stacked(self):
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise IndexError
        self.ask(module, name)

    def call(self):
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, _Tuple | _Inert):
            raise ValueError("its pickle calls something that is not a function")
        match function.name:
            case "_rebuild_tensor_v2":
                self.push(_tensor(arguments))
            case "_rebuild_parameter":
                if not isinstance(arguments, _Tuple) or not arguments or not isinstance(arguments[0], _Tensor):
                    raise ValueError("a parameter in it is not a tensor")
                self.push(arguments[0])
            case "OrderedDict":
                if arguments != ():
                    raise ValueError("an OrderedDict in it is made from a list")
                self.push({})
            case _:
                if function.name in _STORAGES:
                    raise ValueError("its pickle calls a storage")
                self.push(_Inert())

    def build(self):
        self.pop()
        # An OrderedDict has version numbers as attributes, a Namespace the settings of a run.
        if type(self.stack[-1]) not in (dict, _Inert):
            raise ValueError("its pickle gives attributes to something that has none")

    def find_storage(self):
        given = self.pop()
        match given:
            case ("storage", _Name("torch", kind), str(key), str(), int(count)) if kind in _STORAGES and count >= 0:
                self.push(_Storage(np.dtype(_STORAGES[kind]), key, count))
            case _:
                raise ValueError("a storage in it is not described as torch does")


def _tensor(arguments: Any) -> _Tensor:
    match arguments:
        case (_Storage() as storage, int(offset), tuple(shape), tuple(strides), _, hooks, *rest):
            numbers = (offset, *shape, *strides)
            if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
                raise ValueError("a tensor in it has sizes that are not integers of at least 0")
            # Hooks and flags such as "negated" would change the stored values.
            if hooks != {} or rest not in ([], [None]):
                raise ValueError("a tensor in it has hooks or flags")
            return _Tensor(storage, offset, tuple(shape), tuple(strides))
    raise ValueError("a tensor in it is not described as torch does")


def _kind(value: Any) -> str:
    return {_Tuple: "tuple", _Name: "class", _Tensor: "tensor", _Inert: "list or object"}.get(
        type(value), type(value).__name__
    )


def _global(machine: _Machine, argument: str):
    module, _, name = argument.partition(" ")
    machine.ask(module, name)


def _put(machine: _Machine, index: int | None):
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _nothing(machine: _Machine, argument: Any):
    pass


_STEPS = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"), _Machine.push),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _Machine.push_number),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "EMPTY_TUPLE": lambda m, _: m.push_tuple([]),
    "TUPLE": lambda m, _: m.push_tuple(m.pop_to_mark()),
    "TUPLE1": lambda m, _: m.push_tuple([m.pop()]),
    "TUPLE2": lambda m, _: m.push_tuple([m.pop(), m.pop()][::-1]),
    "TUPLE3": lambda m, _: m.push_tuple([m.pop(), m.pop(), m.pop()][::-1]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda m, _: m.push(_Inert())),
    "FROZENSET": lambda m, _: (m.pop_to_mark(), m.push(_Inert())),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "APPEND": lambda m, _: m.add_items([m.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: m.add_items(m.pop_to_mark())),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "GLOBAL": _global,
    "STACK_GLOBAL": lambda m, _: m.ask_stacked(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.call()),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.find_storage(),
}
