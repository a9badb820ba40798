"""The lease on a workdir: only one run at a time writes to it, and holds a lease file that it renews.

A start is refused while another run renews the lease. The lease of a dead run lapses: at once if its process ran on
this machine and is gone, else `LAPSE` seconds after the last renewal, for which a start waits. Only changes of the file
count, never its timestamps, since the clocks of hosts differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import secrets
import socket
import threading
import time
from typing import Any

from janus_jax.io.files import parse_json, read_json_object
from janus_jax.io.messages import one_line
from train.run.faults import STOPPED, Stopped

FILE = "lease.json"
RENEW = 10  # seconds between renewals
LAPSE = 60  # seconds without a renewal after which a run on another machine counts as dead
_MOVED = ".lapsed"
_PROC = pathlib.Path("/proc")


class Lease:
    """The lease on `folder`, taken by `acquire` and given back by `release`."""

    def __init__(self, folder: pathlib.Path):
        self._path = folder / FILE
        self._mine = {"id": secrets.token_hex(16), "host": socket.gethostname(), "pid": os.getpid()}
        self._mine |= {"machine": _machine(), "started": _started(os.getpid())}
        self._seen: tuple[dict[str, Any], float] | None = None
        self._count, self._held = 0, False
        self._over = threading.Event()

    # ------------------------------------------------------------ taking it

    def acquire(self, steal: bool = False) -> str:
        """Tries to take the lease; returns '' on success, else why it has to wait: then call it again soon.

        Args:
          steal: take it from any holder.
        Raises: ValueError in one line while another run renews it.
        """
        if self._create():
            self._held = True
            threading.Thread(target=self._renew, name="lease", daemon=True).start()
            return ""
        found = self._read()
        if found is None:  # it was given back just now
            return self.acquire(steal)
        if steal or self._lapsed(found):
            self._take_away(found)
            return self.acquire(steal)
        return (
            f"{self._path} is held by {_name(found)}; it lapses if it is not renewed for {LAPSE} seconds, and this "
            "start waits until then"
        )

    def look(self, patience: float = 1.5 * RENEW) -> str:
        """Whether `acquire` would get it, without writing anything: '' if so, else why it would have to wait.

        Args:
          patience: seconds in which a holder on another machine must renew it to count as running.
        Raises: ValueError in one line while another run renews it.
        """
        deadline = time.monotonic() + patience
        while (found := self._read()) is not None and not self._lapsed(found):
            if time.monotonic() >= deadline:
                return (
                    f"{self._path} is held by {_name(found)}, which did not renew it in {patience:g} seconds; a start "
                    f"waits until it has not been renewed for {LAPSE}"
                )
            time.sleep(min(0.5, patience / 4))
        return ""

    def _create(self) -> bool:
        self._mine["time"] = time.time()
        try:
            # Exclusively: of two simultaneous starts, one gets it.
            with self._path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(self._mine))
        except FileExistsError:
            return False
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _read(self) -> dict[str, Any] | None:
        try:
            return read_json_object(self._path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}  # half written or not a lease: it lapses like any other

    def _lapsed(self, found: dict[str, Any]) -> bool:
        if found.get("machine") == self._mine["machine"] and type(pid := found.get("pid")) is int:
            if not _alive(pid, found.get("started")):
                return True
            self._refuse(found)
        if self._seen is None:
            self._seen = found, time.monotonic()
        elif self._seen[0] != found:
            self._refuse(found)
        return time.monotonic() - self._seen[1] > LAPSE

    def _refuse(self, found: dict[str, Any]):
        raise ValueError(
            f"{self._path.parent} is in use by {_name(found)}; stop that run first, choose another workdir, or take "
            "over this one with --steal"
        )

    def _take_away(self, found: dict[str, Any]):
        # Renamed, not deleted: its holder may still write to the file that it has open, and must not write to ours.
        moved = self._path.with_name(f"{FILE}{_MOVED}-{self._mine['id']}")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(moved)
            # Another start may have taken the lease since we read it.
            with contextlib.suppress(OSError, ValueError):
                taken = read_json_object(moved)
                if taken.get("id") != found.get("id"):
                    with contextlib.suppress(FileExistsError), self._path.open("x", encoding="utf-8") as file:
                        file.write(json.dumps(taken))
            moved.unlink()

    # ------------------------------------------------------------ holding it

    @property
    def held(self) -> bool:
        """Whether this run still holds it; False forever once another start has taken it."""
        if self._held:
            with contextlib.suppress(OSError, ValueError):
                self._held = read_json_object(self._path, missing_ok=True).get("id") == self._mine["id"]
        return self._held

    def check(self, fresh: bool = False):
        """Raises Stopped if another start took the lease; `fresh`: as of now, even where that has to be asked for."""
        if not self.held:
            found = self._read() or {}
            raise Stopped(
                f"{self._path.parent} was taken over by {_name(found)}; this run ends without writing to it",
                STOPPED,
            )

    def _renew(self):
        while self._held and not self._over.wait(RENEW):
            # Errors of the storage are retried at the next renewal, well before the lease lapses.
            with contextlib.suppress(OSError, ValueError):
                self._held = self._renew_now()

    def _renew_now(self) -> bool:
        """Renews it; False if it is another start's."""
        with self._path.open("r+", encoding="utf-8") as file:
            found = parse_json(file.read(), FILE)
            if not isinstance(found, dict) or found.get("id") != self._mine["id"]:
                return False
            self._count += 1
            file.seek(0)
            file.write(json.dumps(self._mine | {"time": time.time(), "renewed": self._count}))
            file.truncate()
        return True

    def release(self):
        """Gives it back, if this run still holds it."""
        self._over.set()
        if self.held:
            self._held = False
            with contextlib.suppress(OSError):
                self._remove()

    def _remove(self):
        self._path.unlink()


def _name(found: dict[str, Any]) -> str:
    if not isinstance(found.get("host"), str):
        return "another start"
    return f"another start (process {one_line(found.get('pid'), 20)} on {one_line(found['host'], 100)})"


# ---------------------------------------------------------------- processes of this machine


def _machine() -> str:
    """Identifies where process ids are comparable: this boot of this machine, in this pid namespace."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except (OSError, ValueError):
        return f"{platform.node()} {platform.system()}"


def _started(pid: int) -> str | None:
    """The start time of process `pid`, which tells it from earlier ones; None if it is dead or cannot be read."""
    try:
        state, *fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        return None


def _alive(pid: int, started: Any) -> bool:
    """Whether process `pid` is alive and has the start time `started`."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    now = _started(pid)
    # Without a readable /proc/pid, a process that answers counts as the same one. (A killed process answers until its
    # parent has reaped it.)
    return now == started if now is not None else not (_PROC / str(pid) / "stat").exists()
