"""Where shards lie: bytes of a file at an offset, from a folder, over HTTP, or by fsspec.

Only these schemes are known: nothing in a recipe or a manifest can start a command. A name is that
of a file directly below the dataset's place.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from kinodit.models.errors import MissingExtraError, UserError

HTTP_SCHEMES = ("http", "https")
FSSPEC_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "hdfs", "webhdfs", "hf")
"""Stores that fsspec has a driver for. Its local, shell and chained ones are left out."""
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 4
PIECE_BYTES = 1 << 20
_AS_IT_IS = {"Accept-Encoding": "identity"}
MAX_WHOLE_BYTES = 1 << 32


class StorageError(UserError):
    """A place that cannot be read, or a scheme that is not known."""


class TransientError(Exception):
    """A read that may succeed when it is tried again; says what happened."""


class Storage(Protocol):
    """Files of one dataset. Threads share it."""

    def read(self, name: str, offset: int, size: int, limit_s: float) -> bytes:
        """`size` bytes of file `name` from `offset` on: all of them, within `limit_s` seconds.

        Raises:
            TransientError: it may succeed later: no answer, too slow, cut short, a server's fault.
            StorageError: it will not: no such file, no permission, the file is shorter.
        """

    def read_whole(self, name: str, limit_s: float) -> bytes:
        """All bytes of a small file. Raises as `read`."""

    def pieces(self, name: str, limit_s: float) -> Iterator[bytes]:
        """A file from its beginning to its end; each piece within `limit_s`. Raises as `read`."""

    def close(self) -> None:
        """Ends connections."""


def is_remote(place: str) -> bool:
    """Whether a dataset's place is a URL. Raises StorageError for a scheme that is not known."""
    if "://" not in place and "::" not in place and not place.startswith("pipe:"):
        return False
    scheme = place.split(":", 1)[0]
    if "::" in place or scheme not in (*HTTP_SCHEMES, *FSSPEC_SCHEMES):
        raise StorageError(
            f"{place[:200]!r}: shards are read from folders and from "
            f"{', '.join((*HTTP_SCHEMES, *FSSPEC_SCHEMES))}; nothing else is opened"
        )
    return True


def open_storage(url: str) -> Storage:
    """The storage at `url`.

    Raises:
        StorageError: its scheme is not known.
        MissingExtraError: fsspec, or its driver for the scheme, is not installed.
    """
    assert is_remote(url), url
    if url.split(":", 1)[0] in HTTP_SCHEMES:
        return HttpStorage(url)
    return FsspecStorage(url)


class HttpStorage:
    """A folder on a web server that answers range requests. Connections are kept, one a thread."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._own = threading.local()
        self._open: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def read(self, name: str, offset: int, size: int, limit_s: float) -> bytes:
        """See `Storage.read`."""
        if size == 0:
            return b""
        wanted = f"bytes={offset}-{offset + size - 1}"
        status, headers, body = self._get(name, {"Range": wanted}, limit_s, size)
        where = f"{self._url}/{name}"
        if status == 200:
            raise StorageError(
                f"{where}: the server does not answer range requests. Copy the shards to one that "
                "does, or stream them, which is not exact (data.datasets.NAME.stream.shards)"
            )
        if status == 416:
            raise StorageError(
                f"{where} has no bytes at {offset}: it is shorter than its index says"
            )
        if not headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise TransientError(f"{where}: asked for {wanted}, got {headers.get('Content-Range')}")
        if len(body) != size:
            raise TransientError(f"{where}: asked for {size} bytes, got {len(body)}")
        return body

    def read_whole(self, name: str, limit_s: float) -> bytes:
        """See `Storage.read_whole`."""
        status, headers, body = self._get(name, {}, limit_s, MAX_WHOLE_BYTES)
        expected = headers.get("Content-Length")
        if status != 200 or (expected is not None and int(expected) != len(body)):
            raise TransientError(f"{self._url}/{name}: status {status}, {len(body)} of {expected}")
        return body

    def pieces(self, name: str, limit_s: float) -> Iterator[bytes]:
        """See `Storage.pieces`. Over a connection of its own: it may be given up half way."""
        url = f"{self._url}/{urllib.parse.quote(name)}"
        for _ in range(MAX_REDIRECTS):
            parts = urllib.parse.urlsplit(url)
            connection = _connect(parts.scheme, parts.netloc, limit_s)
            try:
                with _deadline(connection, url, limit_s):
                    connection.request("GET", _path_of(parts), headers=_AS_IT_IS)
                    answer = connection.getresponse()
                if answer.status in REDIRECTS:
                    url = self._redirected(name, url, answer.headers)
                    continue
                _require_found(url, answer.status, (200,))
                expected, found = answer.headers.get("Content-Length"), 0
                while True:
                    with _deadline(connection, url, limit_s):
                        piece = answer.read(PIECE_BYTES)
                    if not piece:
                        break
                    found += len(piece)
                    yield piece
                if expected is not None and found != int(expected):
                    raise TransientError(f"{url} was cut off after {found} of {expected} bytes")
                return
            finally:
                connection.close()
        raise StorageError(f"{url}: it was led elsewhere {MAX_REDIRECTS} times")

    def close(self) -> None:
        """Ends connections."""
        with self._lock:
            for connection in self._open:
                connection.close()
            self._open.clear()

    def _get(
        self, name: str, headers: dict[str, str], limit_s: float, size: int
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        url = f"{self._url}/{urllib.parse.quote(name)}"
        for _ in range(MAX_REDIRECTS):
            status, answer, body = self._ask(url, headers, limit_s, size)
            if status not in REDIRECTS:
                break
            url = self._redirected(name, url, answer)
        _require_found(url, status, (200, 206, 416))
        return status, answer, body

    def _redirected(self, name: str, url: str, answer: http.client.HTTPMessage) -> str:
        url = urllib.parse.urljoin(url, answer.get("Location", ""))
        if url.split(":", 1)[0] not in HTTP_SCHEMES:
            raise StorageError(f"{self._url}/{name} leads to {url[:200]!r}")
        return url

    def _ask(
        self, url: str, headers: dict[str, str], limit_s: float, size: int
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request within `limit_s`, though a server may send a byte now and then."""
        parts = urllib.parse.urlsplit(url)
        connection, is_kept = self._connection(parts.scheme, parts.netloc, limit_s)
        timer = threading.Timer(limit_s, _cut, [connection])
        timer.start()
        is_whole = False
        try:
            connection.request("GET", _path_of(parts), headers={**_AS_IT_IS, **headers})
            answer = connection.getresponse()
            # Never more than was asked for, whatever a server sends.
            body = answer.read(size)
            is_whole = answer.isclosed()
            return answer.status, answer.headers, body
        except (OSError, http.client.HTTPException) as error:
            if is_kept and isinstance(error, ConnectionError) and timer.is_alive():
                # A server ends connections that were idle: that is no failure of the read.
                connection.close()
                return self._ask(url, headers, limit_s, size)
            late = "" if timer.is_alive() else f" (no whole answer in {limit_s:g} s)"
            raise TransientError(f"{url}: {str(error) or type(error).__name__}{late}") from error
        finally:
            timer.cancel()
            if not is_whole:
                connection.close()

    def _connection(
        self, scheme: str, host: str, limit_s: float
    ) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection to a host, and whether it is open from an earlier request."""
        kept: dict[tuple[str, str], http.client.HTTPConnection]
        kept = self._own.__dict__.setdefault("kept", {})
        connection = kept.get((scheme, host))
        if connection is None:
            connection = _connect(scheme, host, limit_s)
            kept[scheme, host] = connection
            with self._lock:
                self._open.append(connection)
        return connection, connection.sock is not None


def _connect(scheme: str, host: str, limit_s: float) -> http.client.HTTPConnection:
    if scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, timeout=limit_s, context=context)
    return http.client.HTTPConnection(host, timeout=limit_s)


def _path_of(parts: urllib.parse.SplitResult) -> str:
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def _require_found(url: str, status: int, allowed: tuple[int, ...]) -> None:
    if status in RETRIED_STATUS:
        raise TransientError(f"{url}: the server answered {status}")
    if status not in allowed:
        raise StorageError(f"{url} cannot be read: the server answered {status}")


@contextmanager
def _deadline(connection: http.client.HTTPConnection, url: str, limit_s: float) -> Iterator[None]:
    """Cuts the connection after `limit_s`, though a server may send a byte now and then."""
    timer = threading.Timer(limit_s, _cut, [connection])
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        late = "" if timer.is_alive() else f" (nothing more in {limit_s:g} s)"
        raise TransientError(f"{url}: {str(error) or type(error).__name__}{late}") from error
    finally:
        timer.cancel()


def _cut(connection: http.client.HTTPConnection) -> None:
    """Ends what a thread waits for."""
    with suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(2)


class FsspecStorage:
    """A place that fsspec has a driver for; settings and keys come from its own environment."""

    def __init__(self, url: str) -> None:
        scheme = url.split(":", 1)[0]
        try:
            import fsspec
        except ImportError as error:
            raise MissingExtraError("fsspec", "remote", f"reading {scheme}:// shards") from error
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        except ImportError as error:
            raise MissingExtraError(str(error), "remote", f"reading {scheme}:// shards") from error
        self._url = url.rstrip("/")
        # A driver cannot be interrupted: what it was asked is left to itself when time is up.
        self._pool = ThreadPoolExecutor(64, thread_name_prefix="fsspec")

    def read(self, name: str, offset: int, size: int, limit_s: float) -> bytes:
        """See `Storage.read`."""
        body = self._ask(name, limit_s, start=offset, end=offset + size)
        if len(body) != size:
            raise TransientError(f"{self._url}/{name}: asked for {size} bytes, got {len(body)}")
        return body

    def read_whole(self, name: str, limit_s: float) -> bytes:
        """See `Storage.read_whole`."""
        return self._ask(name, limit_s)

    def pieces(self, name: str, limit_s: float) -> Iterator[bytes]:
        """See `Storage.pieces`."""
        where = f"{self._url}/{name}"
        try:
            path = f"{self._root.rstrip('/')}/{name}"
            with self._pool.submit(self._files.open, path, "rb").result(limit_s) as file:
                while piece := self._pool.submit(file.read, PIECE_BYTES).result(limit_s):
                    yield piece
        except FutureTimeout as error:
            raise TransientError(f"{where}: no answer in {limit_s:g} s") from error
        except (FileNotFoundError, PermissionError) as error:
            raise StorageError(f"{where} cannot be read: {error}") from error
        except OSError as error:
            raise TransientError(f"{where}: {error}") from error

    def close(self) -> None:
        """Ends connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, name: str, limit_s: float, **window: int) -> bytes:
        where = f"{self._url}/{name}"
        job = self._pool.submit(self._cat, f"{self._root.rstrip('/')}/{name}", window)
        try:
            return job.result(limit_s)
        except FutureTimeout as error:
            raise TransientError(f"{where}: no answer in {limit_s:g} s") from error
        except (FileNotFoundError, PermissionError) as error:
            raise StorageError(f"{where} cannot be read: {error}") from error

    def _cat(self, path: str, window: dict[str, Any]) -> bytes:
        try:
            return bytes(self._files.cat_file(path, **window))
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            # Drivers raise what their libraries raise: all of it may be the network.
            raise TransientError(f"{path}: {type(error).__name__}: {error}") from error
