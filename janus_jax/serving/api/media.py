"""Pictures of requests: data URLs, and URLs of hosts that the server was told to trust."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urlsplit

from PIL import Image

from janus_jax.io.messages import one_line
from janus_jax.processing.image_files import open_image
from janus_jax.serving.api.errors import bad

_SECONDS, _BYTES = 10.0, 20 << 20


class Remote:
    """Fetches pictures from `hosts`, and from nowhere else.

    Every address that a host's name stands for must be public, and the connection goes to that address: a name of the
    list must not lead into the server's own network. Redirects are not followed.
    """

    def __init__(self, hosts: tuple[str, ...] = (), seconds: float = _SECONDS, most: int = _BYTES):
        self._hosts, self._seconds, self._most = {host.lower() for host in hosts}, seconds, most

    def fetch(self, url: str, where: str) -> bytes:
        """The bytes behind `url`; ApiError, naming `where` it stood in the request."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise bad(f"{where}: the image URL is not a URL", where) from None
        host = (parts.hostname or "").lower()
        if parts.scheme not in ("http", "https") or host not in self._hosts:
            raise bad(f"{where}: this server fetches no images from there; send the image as a data URL", where)
        try:
            return self._get(parts.scheme, host, port, f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise bad(f"{where}: the image could not be fetched ({one_line(error)})", where) from None

    def _get(self, scheme: str, host: str, port: int | None, path: str) -> bytes:
        port = port or (443 if scheme == "https" else 80)
        deadline = time.monotonic() + self._seconds
        connection = http.client.HTTPConnection(host, port, timeout=self._seconds)
        connection.sock = _connect(host, port, self._seconds)
        try:
            if scheme == "https":
                connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
            connection.request("GET", path, headers={"Accept": "image/*"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            read = bytearray()
            while piece := answer.read1(1 << 16):
                read += piece
                if len(read) > self._most:
                    raise ValueError(f"it has more than {self._most >> 20} MiB")
                if time.monotonic() > deadline:
                    raise ValueError(f"it takes longer than {self._seconds:g} s")
            return bytes(read)
        finally:
            connection.close()


def _connect(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to one of the host's addresses, all of which must be public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [address[4][0] for address in found]
    if not addresses or not all(map(_is_public, addresses)):
        raise ValueError("it has a private address")
    return socket.create_connection((addresses[0], port), timeout=seconds)


def _is_public(address: str) -> bool:
    own = ipaddress.ip_address(address.split("%")[0])
    own = getattr(own, "ipv4_mapped", None) or own
    return own.is_global and not own.is_multicast


def picture_of(url: str, where: str, memory: int, remote: Remote) -> Image.Image:
    """The picture of a data URL, or behind a URL that may be fetched; ApiError, naming `where` it stood."""
    # Anything else would be a path of the server's own.
    source = url if url.startswith("data:") else remote.fetch(url, where)
    try:
        return open_image(source, memory)
    except (ValueError, OSError) as error:
        raise bad(f"{where}: {error}", where) from None
