"""Requests to object stores, `gs://` and `s3://`: bytes by range, listings and writes, with tries and clear errors.

Bytes are read and written by tensorstore, which needs nothing else to be installed; names, sizes and large uploads go
through fsspec, whose file systems for the stores are the extras `gcs` and `s3`.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from janus_jax.io.messages import one_line

T = TypeVar("T")

SCHEMES = ("gs", "s3")
_LIBRARY = {"gs": "gcsfs", "s3": "s3fs"}
_EXTRA = {"gs": "gcs", "s3": "s3"}
_CREDENTIALS = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
}
# Seconds between tries, two minutes in total: by then a store that was only busy answers again.
WAITS = (0.2, 0.5, 1, 2, 4, 8, 15, 30, 60)
_SAY_EVERY = 10  # seconds between reports of tries, however many threads are waiting
_PIECE = 8 << 20  # bytes of a request; larger spans are several at once
_IN_FLIGHT = 64  # requests of this process
_STALLED = 60  # seconds without a byte after which a request is tried again

# Words of tensorstore's errors, which come as ValueErrors.
_TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL", "UNKNOWN")
_REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "Forbidden", "AccessDenied", "Access Denied", "Invalid Credentials")
_NO_CREDENTIALS = ("NoCredentialsError", "DefaultCredentialsError", "RefreshError", "TokenRetrievalError")
_ANONYMOUS = ("Anonymous caller", "Unable to locate credentials")
_NO_BUCKET = ("NoSuchBucket", "bucket does not exist")


class StoreUnavailable(OSError):
    """A store did not answer, in spite of all tries; the same command may work later."""


def is_store(path: Any) -> bool:
    """Whether `path` is the address of an object in a store."""
    return isinstance(path, str | os.PathLike) and str(path).startswith(tuple(f"{name}://" for name in SCHEMES))


def split(address: str) -> tuple[str, str, str]:
    """Scheme, bucket and key of an address; ValueError without a bucket."""
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise ValueError(f"{one_line(address)} names no bucket; expected {scheme}://BUCKET/PATH")
    return scheme, bucket, key


# ---------------------------------------------------------------- clients


@functools.cache
def files(scheme: str) -> Any:
    """The file system of fsspec; OSError if its library is not installed."""
    # Types of buckets would be asked for by another service, with other rights; and orbax would take TensorFlow's
    # file system wherever that is installed.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec

    # Other processes write to the same folders: what was listed once is listed again. Orbax shares these settings.
    for name in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem({"gs": "gcs", "s3": "s3"}[scheme], **_patience(scheme))
    except ImportError:
        raise OSError(
            errno.ENOPKG,
            f"{scheme}:// needs the package {_LIBRARY[scheme]}; pip install 'janus_jax[{_EXTRA[scheme]}]'",
        ) from None


def _patience(scheme: str) -> dict[str, Any]:
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": _STALLED, "read_timeout": _STALLED}}
    from aiohttp import ClientTimeout

    return {"requests_timeout": ClientTimeout(total=None, sock_connect=_STALLED, sock_read=_STALLED)}


def kvstore_spec(address: str) -> dict[str, Any]:
    """The spec of the key-value store of tensorstore whose keys begin with `address`."""
    scheme, bucket, key = split(address)
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": key}
    spec = {"driver": "s3", "bucket": bucket, "path": key}
    # Other stores of the same protocol, which tensorstore does not look for.
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
        spec["aws_region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return spec


@functools.cache
def store_context() -> Any:
    """The context of tensorstore for requests to stores."""
    import tensorstore as ts  # late: commands that only read local files need none of it

    # Otherwise it waits forever for a connection that is lost without a word.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(_STALLED))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    # Few tries of its own: ours are reported.
    tries = {"max_retries": 2, "initial_delay": "100ms", "max_delay": "500ms"}
    busy = {"limit": _IN_FLIGHT}
    return ts.Context(
        {
            "gcs_request_retries": tries,
            "s3_request_retries": tries,
            "gcs_request_concurrency": busy,
            "s3_request_concurrency": busy,
        }
    )


@functools.cache
def _bucket(scheme: str, bucket: str) -> Any:
    import tensorstore as ts

    return ts.KvStore.open(kvstore_spec(f"{scheme}://{bucket}/"), context=store_context()).result()


def _forget() -> None:
    for made in (files, store_context, _bucket):
        made.cache_clear()


os.register_at_fork(after_in_child=_forget)


# ---------------------------------------------------------------- requests


def read_spans(address: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes [begin, end) of an object for each of `spans`; see `read_many`."""
    return read_many([(address, begin, end) for begin, end in spans])


def read_many(spans: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes [begin, end) of the object at each address, all requested at the same time.

    Raises: FileNotFoundError, PermissionError, StoreUnavailable; ValueError if an object ends before.
    """
    pieces = [
        (place, address, begin, min(begin + _PIECE, end))
        for place, (address, start, end) in enumerate(spans)
        for begin in range(start, end, _PIECE)
    ]
    found: list[bytes | None] = [None] * len(pieces)
    last = [""]  # the address at which an error was met

    def read() -> None:
        left = [i for i, data in enumerate(found) if data is None]
        # At most this many in memory that are not yet ours.
        for first in range(0, len(left), 2 * _IN_FLIGHT):
            some = left[first : first + 2 * _IN_FLIGHT]
            futures = [_read(*pieces[i][1:]) for i in some]
            for i, future in zip(some, futures, strict=True):
                last[0] = pieces[i][1]
                result = future.result()
                if result.state != "value":
                    raise FileNotFoundError(errno.ENOENT, "no such object", last[0])
                found[i] = result.value

    if pieces:
        request(pieces[0][1], read, last)
    joined: list[list[bytes]] = [[] for _ in spans]
    for (place, *_), data in zip(pieces, found, strict=True):
        joined[place].append(data or b"")
    whole = [parts[0] if len(parts) == 1 else b"".join(parts) for parts in joined]
    for (address, begin, end), data in zip(spans, whole, strict=True):
        if len(data) != end - begin:
            raise ValueError(f"{one_line(address)} has become shorter since it was opened")
    return whole


def _read(address: str, begin: int, end: int) -> Any:
    scheme, bucket, key = split(address)
    return _bucket(scheme, bucket).read(key, byte_range=slice(begin, end))


def write(address: str, data: bytes) -> None:
    """Writes a whole object: readers see the one before until this one is complete."""

    def put() -> None:
        scheme, bucket, key = split(address)
        _bucket(scheme, bucket).write(key, data).result()

    try:
        request(address, put)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, f"there is no bucket {split(address)[1]}", address) from None


def read_versioned(address: str) -> tuple[bytes | None, bytes]:
    """The content of an object, None if there is none, and its version, which `write_if` takes."""

    def get() -> tuple[bytes | None, bytes]:
        scheme, bucket, key = split(address)
        found = _bucket(scheme, bucket).read(key).result()
        return (bytes(found.value) if found.state == "value" else None), found.stamp.generation

    return request(address, get)


def write_if(address: str, data: bytes | None, version: bytes) -> bytes | None:
    """Writes a small object whole, or removes it if `data` is None, if it still has the `version`; the store decides.

    Returns: the new version; None if the object has changed. A write whose answer is lost is tried again, and then
      meets itself: a caller who gets None has to look whose content is there.
    """

    def put() -> bytes:
        scheme, bucket, key = split(address)
        return _bucket(scheme, bucket).write(key, data, if_equal=version).result().generation

    try:
        return request(address, put) or None
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, f"there is no bucket {split(address)[1]}", address) from None


def info(address: str) -> dict[str, Any] | None:
    """fsspec's description of an object or a folder (`type`, `size`), or None if there is neither."""
    try:
        return request(address, lambda: files(split(address)[0]).info(address))
    except FileNotFoundError:
        return None


def version_of(found: dict[str, Any]) -> str:
    """What tells this version of an object, of which `info` or a listing says `found`, from others."""
    return f"{found.get('generation') or found.get('ETag') or found.get('mtime')} {found['size']}"


def request(address: str, function: Callable[[], T], last: Sequence[str] = ()) -> T:
    """The result of `function`, tried again while the store is busy or the connection breaks; each wait is reported.

    Args:
      last: holds the address at which an error was met, if that is not `address`.
    Raises: FileNotFoundError, PermissionError, StoreUnavailable or another OSError, in one line with the address.
    """
    split(address)
    for wait in (*WAITS, None):
        try:
            return function()
        except Exception as error:
            address = next(iter(last), "") or address
            told = _told(error, address)
            if not isinstance(told, StoreUnavailable) or wait is None:
                raise told from None
        _say(f"note: {told.strerror}: {one_line(address)}; trying again")
        time.sleep(wait)
    raise AssertionError("unreachable")


def request_all(address: str, starts: Sequence[Callable[[], Callable[[], T]]]) -> list[T]:
    """What many requests come to, tried again and told as by `request`.

    Args:
      starts: each starts one and returns what waits for it. All are started before the first is waited for; those that
        fail are started again.
    """
    found: dict[int, T] = {}

    def attempt() -> None:
        waiting = {i: start() for i, start in enumerate(starts) if i not in found}
        failed = None
        for i, wait in waiting.items():
            try:
                found[i] = wait()
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed

    request(address, attempt)
    return [found[i] for i in range(len(starts))]


def _told(error: Exception, address: str) -> OSError | ValueError:
    scheme, bucket, _ = split(address)
    name, text = type(error).__name__, str(error)
    status = getattr(error, "code", None) if type(error).__module__.startswith("gcsfs") else None
    if isinstance(error, StoreUnavailable) or (isinstance(error, OSError) and error.errno == errno.ENOPKG):
        return error
    if any(word in text for word in _NO_BUCKET):
        return FileNotFoundError(errno.ENOENT, f"there is no bucket {bucket}", address)
    if name in _NO_CREDENTIALS or ("redential" in text and "nvalid" not in text and not isinstance(error, OSError)):
        cure = _CREDENTIALS[scheme]
        return PermissionError(errno.EACCES, f"no credentials for {scheme}://{bucket}: {cure}", address)
    if isinstance(error, PermissionError) or status in (401, 403) or any(word in text for word in _REFUSED):
        return PermissionError(errno.EACCES, f"these credentials may not do this in {scheme}://{bucket}", address)
    if isinstance(error, FileNotFoundError) or text.startswith("NOT_FOUND"):
        return FileNotFoundError(errno.ENOENT, "no such object", address)
    if isinstance(error, ValueError) and text.startswith("OUT_OF_RANGE"):
        return ValueError(f"{one_line(address)} has become shorter since it was opened")
    cause = one_line(text.partition(" [")[0] or name, 200)
    if isinstance(error, ValueError) and not text.startswith(_TRANSIENT):
        return OSError(errno.EIO, cause, address)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return OSError(errno.EIO, cause, address)
    return StoreUnavailable(errno.ETIMEDOUT, f"the store does not answer ({cause})", address)


_said = threading.Lock()
_last = [-float(_SAY_EVERY)]


def _say(line: str) -> None:
    with _said:
        if time.monotonic() - _last[0] < _SAY_EVERY:
            return
        _last[0] = time.monotonic()
    print(line, file=sys.stderr, flush=True)
