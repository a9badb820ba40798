"""Paths that may be local, `gs://` or `s3://`: `as_path` gives a `pathlib.Path`, or a `StorePath` with its methods.

A store has objects, and no folders, links, locks or renames: a folder is there as long as an object's name begins with
its name, and a write is whole or not seen. What is written under several names is marked as complete by the last one.
"""

from __future__ import annotations

import datetime
import functools
import glob
import io
import os
import pathlib
import posixpath
import re
import shutil
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from janus_jax.io.messages import one_line
from janus_jax.io.store_access import (
    SCHEMES,
    files,
    info,
    is_store,
    read_spans,
    read_versioned,
    request,
    split,
    version_of,
    write,
)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_BUFFER = 4 << 20  # bytes read at least, from one position on


def as_path(path: str | os.PathLike) -> pathlib.Path:
    """The path of a local file or folder, or a `StorePath`, which has the methods of one that are used here.

    Raises: ValueError for the address of another kind of store.
    """
    if isinstance(path, StorePath):
        return path  # type: ignore[return-value]
    if is_store(path):
        return StorePath(os.fspath(path))  # type: ignore[return-value]
    if isinstance(path, str) and (found := _SCHEME.match(path)):
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"{one_line(path)}: {found[1]}:// is not supported; use a local path, or one of {known}")
    return pathlib.Path(path)


@functools.total_ordering
class StorePath(os.PathLike):
    """The path of an object or a folder in a store, with the methods of `pathlib.Path`; missing folders need no making.

    Errors are OSErrors in one line; requests are retried, see `store_access.request`.
    """

    def __init__(self, address: str, known: dict[str, Any] | None = None):
        """`known` is what a listing says of the object or folder, which is then not asked for again."""
        scheme, bucket, key = split(os.fspath(address))
        key = posixpath.normpath(f"/{key}").lstrip("/")
        self._address, self._known = f"{scheme}://{bucket}/{key}" if key else f"{scheme}://{bucket}", known

    def __fspath__(self) -> str:
        return self._address

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"StorePath({self._address!r})"

    def __hash__(self) -> int:
        return hash(self._address)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self._address == other._address

    def __lt__(self, other: Any) -> bool:
        return self._parts < other._parts if isinstance(other, StorePath) else NotImplemented

    # ------------------------------------------------------------ names

    @property
    def _parts(self) -> list[str]:
        return self._address.split("/")[2:]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self._parts)

    @property
    def _pure(self) -> pathlib.PurePosixPath:
        return pathlib.PurePosixPath("/", *self._parts)

    @property
    def name(self) -> str:
        return self._parts[-1] if len(self._parts) > 1 else ""

    @property
    def suffix(self) -> str:
        return pathlib.PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return pathlib.PurePosixPath(self.name).stem

    @property
    def parent(self) -> StorePath:
        return StorePath(self._address.rpartition("/")[0]) if self.name else self

    @property
    def parents(self) -> list[StorePath]:
        found, path = [], self
        while path.name:
            path = path.parent
            found.append(path)
        return found

    def __truediv__(self, other: str | os.PathLike) -> Any:
        other = os.fspath(other)
        # As for local paths, an absolute one replaces what is before it.
        return as_path(other) if is_store(other) or other.startswith("/") else StorePath(f"{self._address}/{other}")

    def with_name(self, name: str) -> StorePath:
        return self.parent / name

    def with_suffix(self, suffix: str) -> StorePath:
        return self.with_name(self.stem + suffix)

    def absolute(self) -> StorePath:
        return self

    resolve = absolute

    def relative_to(self, other: StorePath) -> pathlib.PurePosixPath:
        return self._pure.relative_to(other._pure)

    # ------------------------------------------------------------ what is there

    def _info(self) -> dict[str, Any] | None:
        return self._known or info(self._address)

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        found = self._info()
        return found is not None and found["type"] == "file"

    def is_dir(self) -> bool:
        found = self._info()
        return found is not None and found["type"] == "directory"

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> os.stat_result:
        """Size and time of change of an object."""
        found = self._info()
        if found is None:
            raise FileNotFoundError(2, "no such object", self._address)
        return _status(found)

    def version(self) -> str:
        """What tells this version of the object from others."""
        found = self._info()
        if found is None:
            raise FileNotFoundError(2, "no such object", self._address)
        return version_of(found)

    def iterdir(self) -> Iterator[StorePath]:
        """What is in the folder, whose kinds and sizes are then known; FileNotFoundError if there is no folder."""
        scheme, *_ = split(self._address)
        found = request(self._address, lambda: files(scheme).ls(self._address, detail=True))
        paths = (StorePath(f"{scheme}://{each['name']}", each) for each in found)
        return (path for path in paths if path != self)

    def walk(self) -> list[StorePath]:
        """All objects whose names begin with this folder's, sorted, from one listing; none if there is no folder."""
        return self._matching("find", self._address)

    def glob(self, pattern: str) -> list[StorePath]:
        return self._matching("glob", f"{self._address}/{pattern}")

    def _matching(self, method: str, address: str) -> list[StorePath]:
        scheme, *_ = split(address)
        found = request(self._address, lambda: getattr(files(scheme), method)(address, detail=True))
        return [StorePath(f"{scheme}://{name}", each) for name, each in sorted(found.items())]

    # ------------------------------------------------------------ contents

    def open(self, mode: str = "r", encoding: str | None = None) -> Any:
        """The object for reading."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{one_line(self)}: objects in a store are read, or written whole, not opened for {mode}")
        file = open_object(self)
        return file if mode == "rb" else io.TextIOWrapper(file, encoding=encoding or "utf-8")

    def read_bytes(self) -> bytes:
        """By one request, so that all of it is of one version."""
        data, _ = read_versioned(self._address)
        if data is None:
            raise FileNotFoundError(2, "no such object", self._address)
        return data

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        write(self._address, bytes(data))
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def upload(self, local: str | os.PathLike) -> None:
        """Writes the local file `local` here, in parts if it is large; seen when complete."""
        scheme, *_ = split(self._address)
        request(self._address, lambda: files(scheme).put_file(os.fspath(local), self._address))

    # ------------------------------------------------------------ changes

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: an object's name makes its folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        scheme, *_ = split(self._address)
        try:
            request(self._address, lambda: files(scheme).rm_file(self._address))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        """Nothing: a folder goes with its last object."""

    def rmtree(self, kept: Collection[StorePath] = ()) -> None:
        """Removes everything whose name begins with this folder's, except the objects `kept`."""
        scheme, *_ = split(self._address)
        found = [str(path) for path in self.walk() if path not in kept]
        if found:
            request(self._address, lambda: files(scheme).rm(found))


def _status(found: dict[str, Any]) -> os.stat_result:
    changed = found.get("mtime") or found.get("LastModified")
    seconds = changed.timestamp() if isinstance(changed, datetime.datetime) else float(changed or 0)
    mode = 0o040755 if found["type"] == "directory" else 0o100644
    times = (int(seconds),) * 3
    return os.stat_result((mode, 0, 0, 1, 0, 0, int(found.get("size") or 0), *times))


class _Object(io.RawIOBase):
    def __init__(self, path: StorePath, size: int):
        self.name, self.size, self._at = os.fspath(path), size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(offset + (0, self._at, self.size)[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(self.size - self._at, 0))
        if count:
            (data,) = read_spans(self.name, [(self._at, self._at + count)])
            memoryview(buffer).cast("B")[:count] = data
            self._at += count
        return count


def open_object(path: str | os.PathLike) -> BinaryIO:
    """An object of a store, for reading bytes at any position.

    Raises: FileNotFoundError; IsADirectoryError for a folder; PermissionError and other OSErrors.
    """
    path = path if isinstance(path, StorePath) else StorePath(os.fspath(path))
    found = path._info()
    if found is None:
        raise FileNotFoundError(2, "no such object", os.fspath(path))
    if found["type"] != "file":
        raise ValueError(f"{one_line(path)} is a folder, not a regular file")
    size = int(found["size"])
    return io.BufferedReader(_Object(path, size), min(_BUFFER, max(size, 1)))


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file, local or in a store."""
    raw = getattr(file, "raw", file)
    return raw.size if isinstance(raw, _Object) else os.fstat(file.fileno()).st_size


def has_pattern(path: str | os.PathLike) -> bool:
    """Whether `path` is a pattern for names."""
    return glob.has_magic(os.fspath(path))


def matching(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that match the pattern `path`, sorted."""
    if isinstance(path, StorePath):
        found = StorePath(f"{split(str(path))[0]}://{path.parts[0]}").glob("/".join(path.parts[1:]))
        return [each for each in found if each.is_file()]  # type: ignore[misc]
    return sorted(pathlib.Path(name) for name in glob.glob(str(path), recursive=True) if not os.path.isdir(name))


def missing(path: str | os.PathLike) -> FileNotFoundError:
    """The error for an address where nothing is, which tells a missing bucket from a missing folder."""
    try:
        check_bucket(path)
    except FileNotFoundError as error:
        return error
    return FileNotFoundError(f"{one_line(path)}: no such file or folder")


def check_bucket(path: str | os.PathLike) -> None:
    """FileNotFoundError if the bucket of an address does not exist."""
    scheme, bucket, _ = split(os.fspath(path))
    if info(f"{scheme}://{bucket}") is None:
        raise FileNotFoundError(f"{one_line(path)}: there is no bucket {bucket}")


def lexists(path: pathlib.Path) -> bool:
    """Whether there is anything at `path`, be it a link that leads nowhere."""
    return path.exists() if isinstance(path, StorePath) else os.path.lexists(path)


def local_only(path: str | os.PathLike, how: str = "written to") -> pathlib.Path:
    """`path`, for what is written to (or `how` else) local folders only; ValueError for the address of a store."""
    text = os.fspath(path)
    # `pathlib.Path` makes one slash of two.
    if isinstance(text, str) and re.match(rf"({'|'.join(SCHEMES)}):/", text):
        raise ValueError(f"{one_line(text)} is in a store, and this is {how} local folders only; copy it from there")
    return pathlib.Path(path)


def copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies one small file, to or from a store."""
    if is_store(source) or is_store(target):
        target.write_bytes(source.read_bytes())
    else:
        shutil.copyfile(source, target)
