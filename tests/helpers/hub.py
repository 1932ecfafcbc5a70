"""A small real hub on this machine: one repository, in memory."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler

import pytest

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, in memory, for `create_repo`, `upload_folder` and `snapshot_download`."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - shared on purpose
    asked: list[str] = []  # noqa: RUF012
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        url = f"http://{self.headers['Host']}/me/mine"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.reply({"url": url, "name": "me/mine"})
        elif self.path.endswith("/validate-yaml"):
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.reply(
                {"files": [f | {"uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply(
                {"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        else:
            self.reply({"error": self.path}, 404)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self.reply([{"type": "file", "path": k, "size": len(v), "oid": "b" * 40}
                        for k, v in self.files.items()])  # fmt: skip
        elif self.path.startswith("/api/models/me/mine"):
            siblings = [{"rfilename": name} for name in self.files]
            self.reply({"id": "me/mine", "sha": COMMIT, "siblings": siblings})
        elif (name := self.path.partition(f"/resolve/{COMMIT}/")[2]) in self.files:
            self.asked.append(name)
            self.reply(self.files[name])
        else:
            self.reply({"error": self.path}, 404)

    do_HEAD = do_GET

    def reply(self, content: object, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Send what asks the hub to this address."""
    from huggingface_hub import HfApi, constants

    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "nobody")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert HfApi().endpoint == url
