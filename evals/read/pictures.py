"""Pictures of a benchmark, read when they are needed: files, members of zip archives, bytes set aside in a spool."""

from __future__ import annotations

import hashlib
import os
import pathlib
import tempfile
import zipfile
from dataclasses import dataclass

from janus_jax.io.files import open_regular, read_bytes
from janus_jax.io.messages import one_line

MAX_PICTURE = 256 << 20  # bytes of one file


def key_of(data: bytes) -> str:
    """A key that is equal for equal bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class FilePicture:
    """A picture in a file."""

    path: pathlib.Path

    @property
    def key(self) -> str:
        return os.fspath(self.path)

    @property
    def name(self) -> str:
        return one_line(self.path, 500)

    def read(self) -> bytes:
        return read_bytes(self.path, MAX_PICTURE)


@dataclass(frozen=True)
class ZipPicture:
    """A picture in a zip archive."""

    archive: pathlib.Path
    member: str

    @property
    def key(self) -> str:
        return f"{self.archive}!{self.member}"

    @property
    def name(self) -> str:
        return f"{one_line(self.member)} in {one_line(self.archive, 500)}"

    def read(self) -> bytes:
        return read_member(self.archive, self.member, MAX_PICTURE)


def read_member(archive: pathlib.Path, member: str, limit: int) -> bytes:
    """The bytes of a file in a zip archive; ValueError if it is not there, damaged, or larger than `limit`."""
    try:
        with open_regular(archive) as file, zipfile.ZipFile(file) as opened:
            if (size := opened.getinfo(member).file_size) > limit:
                raise ValueError(f"{one_line(member)} in {one_line(archive)} has {size:,} bytes, more than {limit:,}")
            return opened.read(member)
    except KeyError:
        raise ValueError(f"{one_line(archive)} has no member {one_line(member)}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{one_line(member)} in {one_line(archive)}: {one_line(error)}") from None


def zip_members(archive: pathlib.Path) -> list[str]:
    """The names of the files in a zip archive; ValueError if it is none."""
    try:
        with open_regular(archive) as file, zipfile.ZipFile(file) as opened:
            return [member.filename for member in opened.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{one_line(archive)} is not a zip archive that can be read: {one_line(error)}") from None


class Spool:
    """Distinct pictures set aside in a temporary file, which the system removes when this process ends.

    Row groups of parquet files are far too large to be read again for each picture.
    """

    def __init__(self):
        # Stays open for as long as pictures refer to it.
        self._file = tempfile.TemporaryFile(prefix="janus_jax_evals_")  # noqa: SIM115
        self._spans: dict[str, tuple[int, int]] = {}
        self._end = 0

    def keep(self, data: bytes, name: str) -> SpooledPicture:
        """A picture that reads `data`, of which one copy is kept."""
        key = key_of(data)
        if key not in self._spans:
            self._file.seek(self._end)
            self._file.write(data)
            self._spans[key] = (self._end, len(data))
            self._end += len(data)
        return SpooledPicture(self, key, name)

    def read(self, key: str) -> bytes:
        begin, size = self._spans[key]
        self._file.flush()
        return os.pread(self._file.fileno(), size, begin)


@dataclass(frozen=True)
class SpooledPicture:
    """A picture in a spool."""

    spool: Spool
    key: str
    name: str

    def read(self) -> bytes:
        return self.spool.read(self.key)


def is_file(path: pathlib.Path) -> bool:
    """Whether `path` is a file; also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def unreadable(paths: list[pathlib.Path]) -> str | None:
    """Why one of these pictures cannot be there to be read, without opening it; None if all are files."""
    for path in paths:
        if not is_file(path):
            return f"the picture {one_line(path, 500)} is missing"
    return None
