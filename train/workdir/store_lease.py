"""The lease on a workdir in a store: an object that is only written and removed as long as nobody else has changed it.

The store decides, by the object's version, which of two starts gets it; there is nothing to lock and to rename.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import Any

from janus_jax.io.files import parse_json
from janus_jax.io.store_access import read_versioned, write_if
from janus_jax.io.stores import StorePath, check_bucket
from train.run import lease
from train.run.lease import FILE, Lease


class StoreLease(Lease):
    """The lease on `folder` in a store.

    `held` is what the last renewal said, for as long as the next one is not due: asking takes a request.
    """

    def __init__(self, folder: StorePath):
        super().__init__(folder)  # type: ignore[arg-type]
        self._address = str(self._path)
        self._changing = threading.Lock()
        self._version = self._found = b""
        self._known_at = 0.0

    def _create(self) -> bool:
        data, version = read_versioned(self._address)
        return data is None and self._write(version)

    def _write(self, version: bytes) -> bool:
        """Whether this start's lease was written over that `version`."""
        text = json.dumps(self._mine | {"time": time.time(), "renewed": self._count})
        with self._changing:
            new = write_if(self._address, text.encode(), version)
            if new is None:  # somebody else's, or ours if only the answer was lost
                data, new = read_versioned(self._address)
                if data is None:
                    check_bucket(self._address)
                if _parsed(data).get("id") != self._mine["id"]:
                    return False
            self._version, self._known_at = new, time.monotonic()
        return True

    def _read(self) -> dict[str, Any] | None:
        data, self._found = read_versioned(self._address)
        return None if data is None else _parsed(data)

    def _take_away(self, found: dict[str, Any]):
        write_if(self._address, None, self._found)

    @property
    def held(self) -> bool:
        if self._held and time.monotonic() - self._known_at > lease.RENEW:
            with contextlib.suppress(OSError):
                self._ask()
        return self._held

    def _ask(self):
        data, _ = read_versioned(self._address)
        self._held, self._known_at = _parsed(data).get("id") == self._mine["id"], time.monotonic()

    def check(self, fresh: bool = False):
        if fresh and self._held:
            self._ask()
        super().check()

    def _renew_now(self) -> bool:
        self._count += 1
        return self._write(self._version)

    def _remove(self):
        with self._changing:
            write_if(self._address, None, self._version)


def _parsed(data: bytes | None) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = parse_json(data or b"{}", FILE)
        if isinstance(found, dict):
            return found
    return {}  # not a lease: it lapses like any other
