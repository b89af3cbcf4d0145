"""Servers of files: one that misbehaves by script, a real nginx, and an S3 by moto."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

Fault = str
"""What a request meets: "" an answer, "stall", "drip", "cut", "garbage", "reset", or a status."""

STALL_S = 20.0


class FileServer:
    """Serves a folder with range requests. `script`: number of a request for a shard -> fault."""

    def __init__(self, folder: Path, script: Callable[[int], Fault] = lambda _: "") -> None:
        self.folder = folder
        self.script = script
        self.requests: list[tuple[str, str, Fault]] = []
        self._numbers = itertools.count()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def fault(self, name: str) -> Fault:
        return self.script(next(self._numbers)) if name.endswith(".tar") else ""

    def ranges(self) -> list[tuple[str, str]]:
        """(file, range) of every request for a shard that was answered."""
        return [(n, r) for n, r, fault in self.requests if n.endswith(".tar") and not fault]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            name, wanted = self.path.strip("/"), self.headers.get("Range", "")
            fault = server.fault(name)
            server.requests.append((name, wanted, fault))
            path = server.folder / name
            if fault.isdigit() or not path.is_file():
                self.send_response(int(fault) if fault else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            if wanted:
                first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                data = data[first : last + 1]
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            if fault == "reset":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.end_headers()
            if fault == "stall":
                time.sleep(STALL_S)
            if fault == "drip":
                for byte in data:
                    try:
                        self.wfile.write(bytes([byte]))
                    except OSError:
                        return
                    time.sleep(0.1)
            if fault == "garbage":
                data = bytes(len(data))
            if fault == "cut":
                data = data[: len(data) // 2]
                self.close_connection = True
            try:
                self.wfile.write(data)
            except OSError:
                self.close_connection = True

    return Handler


@contextmanager
def nginx(folder: Path, work: Path) -> Iterator[str]:
    """The URL of a real nginx that serves `folder`; the test is skipped where there is none."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(program).is_file():
        pytest.skip("needs nginx (Debian: apt-get install nginx-light)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (work / "nginx.conf").write_text(
        f"""
        daemon off; master_process off; pid {work}/nginx.pid; error_log {work}/error.log;
        events {{ worker_connections 64; }}
        http {{
          access_log {work}/access.log; keepalive_timeout 1s;
          client_body_temp_path {work}/b; proxy_temp_path {work}/p; fastcgi_temp_path {work}/f;
          uwsgi_temp_path {work}/u; scgi_temp_path {work}/s;
          server {{ listen 127.0.0.1:{port}; root {folder}; }}
        }}
        """
    )
    process = subprocess.Popen(
        [program, "-p", str(work), "-c", str(work / "nginx.conf")], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (work / "error.log").read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def s3(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: Callable[[int], Fault]
) -> Iterator[str]:
    """s3:// URL of a bucket of moto's with the files of `folder`; `script` as of `FileServer`."""
    boto3 = pytest.importorskip("boto3", reason="needs moto and boto3 (extra dev)")
    pytest.importorskip("s3fs", reason="needs s3fs (extra remote)")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    backend = DomainDispatcherApplication(create_backend_app)
    numbers = itertools.count()

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        is_shard = environ["PATH_INFO"].endswith(".tar") and environ["REQUEST_METHOD"] == "GET"
        fault = script(next(numbers)) if is_shard else ""
        if fault == "stall":
            time.sleep(STALL_S)
        if fault.isdigit():
            start_response(f"{fault} Fault", [("Content-Length", "0")])
            return [b""]
        answer = list(backend(environ, start_response))
        return [part[: len(part) // 2] for part in answer] if fault == "cut" else answer

    server = make_server("127.0.0.1", 0, application, threaded=True)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="clips")
    for path in folder.iterdir():
        client.upload_file(str(path), "clips", f"a/{path.name}")
    try:
        yield "s3://clips/a"
    finally:
        server.shutdown()
