"""Shards at an address: copies in a bounded folder, and servers that fail."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest

from tracer.data import remote
from tracer.data.build import read_index
from tracer.data.config import LoadingSettings
from tracer.data.remote import ShardCache, address_of
from tracer.errors import UserError


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers /SIZE with that many bytes; /half stops half-way, /once does so the first time, others are 404."""

    asked: list[str]

    def do_GET(self) -> None:
        name = self.path.strip("/").removesuffix(".tar")
        self.asked.append(name)
        size = int(name) if name.isdecimal() else 1000
        if not name.isdecimal() and name not in ("half", "once"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        stops = name == "half" or (name == "once" and self.asked.count("once") == 1)
        self.wfile.write(b"x" * (size // 2 if stops else size))

    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    Failing.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://host/a/{0..3}.tar", "http://host/a/{0..3}.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("file:///data/a.tar", "file:///data/a.tar"),
        ("memory://a.tar", "memory://a.tar"),
        ("/data/a.tar", None),
        ("data/a:b/c.tar", None),
    ],
)
def test_an_address_survives_being_a_path(text, address):
    assert address_of(text) == address_of(Path(text)) == address


def test_what_does_not_exist_is_asked_for_once(server, tmp_path):
    with pytest.raises(UserError, match=r"nothing.tar' cannot be read: the server answers 404"):
        ShardCache(tmp_path / "copies", 10**6).path(f"{server}/nothing.tar")
    assert Failing.asked == ["nothing"]
    with pytest.raises(UserError, match=r"nothing.tar' cannot be read: the server answers 404"):
        read_index(Path(f"{server}/nothing.tar"), None, LoadingSettings(cache=tmp_path))


def test_a_server_that_stops_half_way_is_asked_again_and_then_named(server, tmp_path):
    cache = ShardCache(tmp_path, 10**6)
    assert cache.path(f"{server}/once").stat().st_size == 1000
    assert Failing.asked == ["once", "once"]
    with pytest.raises(UserError, match=r"half' could not be read in 3 tries \(the server stopped after 500"):
        cache.path(f"{server}/half")
    assert [path.name[-4:] for path in tmp_path.iterdir()] == ["once"]


def test_the_copies_stay_within_their_bound(server, tmp_path):
    cache = ShardCache(tmp_path, 1000)
    for size in (400, 401, 400, 402):  # the third is still there, and used again
        assert cache.path(f"{server}/{size}").stat().st_size == size
    assert Failing.asked == ["400", "401", "402"]
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [400, 402]
    assert cache.path(f"{server}/5000").stat().st_size == 5000
    assert len(list(tmp_path.iterdir())) == 1


def test_other_protocols_are_fsspecs(tmp_path):
    import fsspec

    with fsspec.open("memory://set/a.tar", "wb") as file:
        file.write(b"abc")
    cache = ShardCache(tmp_path, 1000)
    assert cache.path("memory://set/a.tar").read_bytes() == b"abc"
    with pytest.raises(UserError, match=r"no such file: check the address"):
        cache.path("memory://set/b.tar")
    with pytest.raises(UserError, match=r"'unheard://a.tar' cannot be read: .*not known"):
        cache.path("unheard://a.tar")
