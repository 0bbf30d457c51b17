"""Downloads are kept only when they are whole, and no secret of an address is written."""

import base64
import hashlib
import io
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import TINY, call_main

import checkpoint
import urls
from urls import without_secrets

NAME = "run.pth"


def saved(step: int = 0) -> bytes:
    buffer = io.BytesIO()
    torch.save({"step": step, "model": {"weight": torch.ones(3)}}, buffer)
    return buffer.getvalue()


def hashed_name(content: bytes) -> str:
    return f"run-{hashlib.sha256(content).hexdigest()[:8]}.pth"


class Handler(BaseHTTPRequestHandler):
    """Sends `server.content`, of which it promises `server.promised` bytes, and then is silent."""

    def do_GET(self):
        server = self.server
        server.requests.append(SimpleNamespace(path=self.path, headers=dict(self.headers)))
        self.send_response(200)
        self.send_header("Content-Length", str(server.promised or len(server.content)))
        self.end_headers()
        self.wfile.write(server.content)
        self.wfile.flush()
        server.released.wait(server.silence)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of one file, with a download cache of its own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.content, http.promised, http.silence, http.requests = saved(), None, 0, []
        http.released = threading.Event()
        http.host = f"127.0.0.1:{http.server_port}"
        http.url = f"http://{http.host}/{NAME}"
        http.cache = tmp_path / "hub" / "checkpoints"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield http
        http.released.set()
        http.shutdown()
        thread.join()


def fails(server, message: str, url: str = "") -> None:
    """One sentence that names the URL and not the cache, in which nothing is left."""
    url = url or server.url
    with pytest.raises(ValueError, match=f"(?s){url}.*{message}") as raised:
        checkpoint.load(url)
    assert str(server.cache) not in str(raised.value)
    assert list(server.cache.iterdir()) == []


def test_a_download_is_kept_and_read_from_there(server):
    for _ in range(2):
        assert checkpoint.load(server.url)["step"] == 0
    assert len(server.requests) == 1
    (kept,) = server.cache.iterdir()
    assert kept.name.endswith(f"_{NAME}")
    assert kept.read_bytes() == server.content


def test_a_download_that_is_cut_short(server):
    server.promised = len(server.content) + 1
    fails(server, f"it ended after {len(server.content)} of {server.promised} bytes")
    server.promised = None
    assert checkpoint.load(server.url)["step"] == 0


@pytest.mark.parametrize("sent", [0, 100], ids=["at once", "in the middle"])
def test_a_silent_server_has_a_time_limit(sent, server, monkeypatch):
    monkeypatch.setattr(urls, "TIMEOUT", 0.2)
    server.promised, server.content, server.silence = 1000, server.content[:sent], 20
    began = time.monotonic()
    fails(server, "the server was silent for 0.2 s")
    assert time.monotonic() - began < 10


def test_a_server_that_answers_no_connection_has_a_time_limit(server, monkeypatch):
    given = []

    def urlopen(request, timeout):
        given.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(urls.urllib.request, "urlopen", urlopen)
    fails(server, "the server was silent for 30 s")
    assert given == [30]


@pytest.mark.parametrize("content", [b"<html>Sign in</html>", b"", saved()[:-100]])
def test_what_is_no_checkpoint_is_not_kept(content, server):
    server.content = content
    fails(server, "it is truncated, corrupt, or holds objects")
    server.content = saved()
    assert checkpoint.load(server.url)["step"] == 0


def test_the_hash_in_a_name_is_checked(server):
    name = hashed_name(server.content)
    url = server.url.replace(NAME, name)
    server.content = saved(1)
    fails(server, f"its hash is [0-9a-f]{{8}}, not {name[4:12]} as its name tells", url)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_damaged_copy_is_downloaded_again(hashed, server, caplog):
    """The hash finds what loads, but is another file; without one it has to be unreadable."""
    url = server.url.replace(NAME, hashed_name(server.content)) if hashed else server.url
    checkpoint.load(url)
    (kept,) = server.cache.iterdir()
    kept.write_bytes(saved(1) if hashed else b"<html>")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load(url)["step"] == 0
    assert f"{url} is downloaded again, as the copy {kept} is damaged" in caplog.text
    assert len(server.requests) == 2
    assert kept.read_bytes() == server.content


def test_a_full_disk(server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(urls.shutil, "copyfileobj", full)
    fails(server, "No space left on device")


# Secrets

SECRETS = ("alice", "hunter2", "t0ken", "s1gned")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/a.pth", "https://host/a.pth"),
        ("https://alice:hunter2@host:8/a.pth", "https://host:8/a.pth"),
        ("https://alice:hunter@2@host/a.pth", "https://host/a.pth"),
        ("https://host/a.pth?token=t0ken&x=s1gned", "https://host/a.pth?..."),
        ("https://host/a.pth#t0ken", "https://host/a.pth?..."),
        ("S3://alice@host/a", "S3://host/a"),
        ("--resume=https://alice@host/a?t0ken --lr 1", "--resume=https://host/a?... --lr 1"),
        ("cannot load http://host/a?t0ken: corrupt", "cannot load http://host/a?...: corrupt"),
        ("user@host, 1 ? 2", "user@host, 1 ? 2"),
        ("tcp://127.0.0.1:29500", "tcp://127.0.0.1:29500"),
    ],
)
def test_secrets_of_an_address_are_left_out(text, expected):
    assert without_secrets(text) == expected == without_secrets(expected)


def test_secrets_are_left_out_of_nested_values():
    value = {"a": ["http://alice@h/x", 1, None], "b": {"c": ("http://h/x?t0ken",)}}
    assert without_secrets(value) == {"a": ["http://h/x", 1, None], "b": {"c": ("http://h/x?...",)}}


def test_user_and_password_are_sent_as_a_header(server):
    url = server.url.replace("//", "//alice:hunter%402@") + "?token=t0ken"
    checkpoint.load(url)
    (request,) = server.requests
    assert request.path == f"/{NAME}?token=t0ken"
    _, credentials = request.headers["Authorization"].split()
    assert base64.b64decode(credentials) == b"alice:hunter@2"


def test_no_secret_is_written_or_shown(server, run, data_path, tmp_path, monkeypatch):
    """Address of --resume and --finetune: in files, checkpoints, on the terminal, in errors."""
    shared = (*TINY, "--data-path", data_path)
    call_main(*shared, "--output_dir", tmp_path / "first")
    server.content = (tmp_path / "first" / "checkpoint.pth").read_bytes()
    url = server.url.replace("//", "//alice:hunter2@") + "?token=t0ken&signature=s1gned"
    folder = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["main.py", "--resume", url])
    endings = [
        run(*shared, "--finetune", url, "--output_dir", folder),
        run(*shared, "--eval", "--resume", url, "--output_dir", folder),
        run(*shared, "--eval", "--resume", url, "--model-kwargs", "depth=1"),
    ]
    assert [ended.code for ended in endings] == [0, 0, 2]
    assert f"main.py: error: {server.url}?... is of another model" in endings[2].err
    server.content = b"<html>"
    for kept in server.cache.iterdir():
        kept.unlink()
    endings.append(run(*shared, "--resume", url))
    assert f"main.py: error: cannot load the checkpoint {server.url}?...:" in endings[3].err
    texts = [ended.out + ended.err for ended in endings]
    texts += [str(checkpoint.load(folder / "checkpoint.pth")["args"])]
    texts += [path.read_bytes().decode("latin1") for path in folder.iterdir()]
    for secret in SECRETS:
        assert not any(secret in text for text in texts), secret
    assert json.loads((folder / "eval.json").read_text())["args"]["resume"] == f"{server.url}?..."
    assert yaml.safe_load((folder / "args.yaml").read_text())["args"]["finetune"].endswith("?...")


def test_an_address_with_another_token_is_the_same_setting():
    saved, now = {"teacher_path": "https://h/a?..."}, {"teacher_path": "https://h/a?t=t0ken"}
    assert checkpoint.difference(saved, now, ["teacher_path"]) == []
