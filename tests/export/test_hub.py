"""export --push-to-hub, against a server of its own that speaks the hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Qncd, save_tiny_dit_pipeline, tiny_config

TOKEN = "hf_stand_in"
CARD = "---\nlicense: mit\nlicense_link: LICENSE.txt\ntags: [old]\n---\n# Tiny\n"


class Hub(ThreadingHTTPServer):
    """Repositories by id, each with its files; blobs of large files by digest."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Requests(BaseHTTPRequestHandler):
    """The requests that huggingface_hub makes for one commit."""

    server: Hub

    def log_message(self, *arguments):
        pass

    def answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_GET(self):
        self.answer({"error": "not here"}, 404)

    def do_PUT(self):
        data, digest = self.body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == digest
        self.server.blobs[digest] = data
        self.answer({})

    def do_POST(self):
        data, path = self.body(), self.path
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            said = json.loads(data)
            name = f"{said['organization']}/{said['name']}"
            self.server.files.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}"})
        if "/preupload/" in path:
            files = json.loads(data)["files"]
            return self.answer({"files": [self.mode(file) for file in files]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            return self.answer({"objects": [self.place(found) for found in objects]})
        name = "/".join(path.split("/")[3:5])
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[name][value["path"]] = self.server.blobs[value["oid"]]
        url = f"{self.server.address}/{name}/commit/{'1' * 40}"
        return self.answer({"commitOid": "1" * 40, "commitUrl": url, "success": True})

    def mode(self, file):
        large = file["path"].endswith(".safetensors")
        return {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
        }

    def place(self, found):
        href = f"{self.server.address}/put/{found['oid']}"
        return {**found, "actions": {"upload": {"href": href}}}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Qncd:
    work = Qncd(tmp_path_factory.mktemp("hub"))
    model = work.folder / "model"
    save_tiny_dit_pipeline(model, layers=1)
    (model / "README.md").write_text(CARD)
    (model / "LICENSE.txt").write_text("as you like")
    changes = {"quantization__weights": {"bits": 8, "rounding": "nearest"}}
    changes |= {"correction__intra": "none", "correction__inter__method": "none"}
    work.write_config(tiny_config(model, **changes))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    return work


def pushed(work: Qncd, hub: Hub, out: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    """The command in a process of its own: what it reads of its environment, it reads at once."""
    told = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HOME": str(work.folder / "home")}
    told |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "qncd_cli", "export", "--to", "diffusers", out, "--json"]
    return subprocess.run(
        [*command, "--push-to-hub", "me/tiny-w8a8"],
        cwd=work.folder,
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_file_of_the_folder_arrives(quantized, hub):
    done = pushed(quantized, hub, "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"].startswith(f"{hub.address}/me/tiny-w8a8/commit/")
    folder: Path = quantized.folder / "out"
    here = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert hub.files["me/tiny-w8a8"] == here
    assert any(name.endswith(".safetensors") for name in here)
    assert here["LICENSE.txt"] == b"as you like"
    card = here["README.md"].decode()
    assert "from_pretrained('me/tiny-w8a8')" in card
    assert 'license: "mit"\nlicense_link: "LICENSE.txt"\n' in card


def test_a_hub_that_refuses_leaves_the_folder(quantized, hub):
    refused = pushed(quantized, hub, "refused", token="hf_wrong")
    assert refused.returncode == 4
    error = json.loads(refused.stdout)["error"]
    assert error["message"].startswith("me/tiny-w8a8: cannot be pushed: ")
    assert "hf auth login" in error["hint"]
    assert (quantized.folder / "refused" / "model_index.json").is_file()


@pytest.mark.parametrize("name", ["tiny", "me/tiny/w8a8", "me/ti ny"])
def test_an_id_that_is_none_is_refused_before_anything_is_written(quantized, name):
    arguments = ("export", "--to", "diffusers", "new", "--push-to-hub", name)
    refused = quantized(*arguments, ok=False)
    assert refused.exit_code == 3
    assert "an id is OWNER/NAME" in refused.stderr
    assert not (quantized.folder / "new").exists()
