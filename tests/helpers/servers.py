"""A real web server on this machine's loopback, for tests of what comes over a network."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple


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
