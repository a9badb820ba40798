"""Replies on disk: a JSON line each, appended as they come, and what they are replies to in the first line."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from evals.asking.identity import difference
from janus_jax.io.files import parse_json, read_bytes
from janus_jax.io.messages import one_line

_MOST = 4 << 30  # bytes


class Lines:
    """A file of JSON lines that is appended to; a context manager.

    What was appended when a call returned is there after a crash. A last line that a crash left incomplete is removed.

    Args:
      path: of the file, made if absent.
      header: what the lines are about: the first line. A file with another one is refused.
      cure: what to do then, for the message.

    Attributes:
      known: the lines by their "id".
    Raises: ValueError for a file of something else, a damaged one, or one that another process appends to.
    """

    def __init__(self, path: pathlib.Path, header: Mapping[str, Any], cure: str = "choose another --out"):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{one_line(path)} is being written by another process; wait for it") from None
            there, lines, size = _read(path)
            if there is not None and (said := difference(there, header)):
                raise ValueError(f"{one_line(path)} holds replies of another evaluation: {said}; {cure}")
            self._file.truncate(size)
            self.known = {line["id"]: line for line in lines}
            if there is None:
                self._append([dict(header)])
                _sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Adds `lines`, which have an "id"; they are on the disk when this returns."""
        lines = [dict(line) for line in lines]
        if lines:
            self._append(lines)
            self.known |= {line["id"]: line for line in lines}

    def _append(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        left = memoryview(text.encode())
        before = self._file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            # On a full disk: the next line must not follow half a line.
            self._file.truncate(before)
            raise

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def read_lines(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The header and the lines by id of a file of `Lines`. OSError if it is not there, ValueError if it is damaged."""
    header, lines, _ = _read(path)
    if header is None:
        raise ValueError(f"{one_line(path)} is empty")
    return header, {line["id"]: line for line in lines}


def _read(path: pathlib.Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """The header (None if there is none yet), the lines, and the bytes up to the end of the last whole line."""
    raw = read_bytes(path, _MOST)
    whole = raw[: raw.rfind(b"\n") + 1]
    parsed = []
    for number, text in enumerate(whole.splitlines(), 1):
        place = f"{one_line(path)} line {number}"
        line = parse_json(text, place)
        if not isinstance(line, dict) or (number > 1 and not isinstance(line.get("id"), str)):
            raise ValueError(f"{place} is not a reply with an id; the file is damaged, or not of this command")
        parsed.append(line)
    if parsed and "id" in parsed[0]:
        raise ValueError(f"{one_line(path)} has no first line that says whose replies it holds")
    return (parsed[0] if parsed else None), parsed[1:], len(whole)


def _sync_folder(folder: pathlib.Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
