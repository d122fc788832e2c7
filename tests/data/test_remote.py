"""Shards at an address: copies in a bounded folder, and servers that fail."""

from __future__ import annotations

import functools
import http.server
import io
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
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
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
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


def read(cache: ShardCache, address: str) -> bytes:
    """Return the content of a shard's copy."""
    with open(cache.open(address), "rb") as file:
        return file.read()


def test_what_does_not_exist_is_asked_for_once(server, tmp_path):
    with pytest.raises(UserError, match=r"nothing.tar' cannot be read: the server answers 404"):
        ShardCache(tmp_path / "copies", 10**6).open(f"{server}/nothing.tar")
    assert Failing.asked == ["nothing"]
    with pytest.raises(UserError, match=r"nothing.tar' cannot be read: the server answers 404"):
        read_index(Path(f"{server}/nothing.tar"), None, LoadingSettings(cache=tmp_path))


def test_a_server_that_stops_half_way_is_asked_again_and_then_named(server, tmp_path):
    cache = ShardCache(tmp_path, 10**6)
    assert len(read(cache, f"{server}/once")) == 1000
    assert Failing.asked == ["once", "once"]
    with pytest.raises(UserError, match=r"half' could not be read in 3 tries \(the server stopped after 500"):
        cache.open(f"{server}/half")
    assert [path.name[-4:] for path in tmp_path.iterdir()] == ["once"]


def test_the_copies_stay_within_their_bound(server, tmp_path):
    cache = ShardCache(tmp_path, 1000)
    for size in (400, 401, 400, 402):  # the third is still there, and used again
        assert len(read(cache, f"{server}/{size}")) == size
    assert Failing.asked == ["400", "401", "402"]
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [400, 402]
    assert len(read(cache, f"{server}/5000")) == 5000
    assert len(list(tmp_path.iterdir())) == 1


def test_a_copy_that_makes_room_before_it_is_open_is_fetched_again(server, tmp_path, monkeypatch):
    """Another process, whose bound is lower, may remove it at any moment; no picture is lost by that."""
    cache, make_room = ShardCache(tmp_path, 1000), ShardCache._make_room

    def and_others(self, newest):
        make_room(self, newest)
        if len(Failing.asked) == 1:
            newest.unlink()

    monkeypatch.setattr(ShardCache, "_make_room", and_others)
    assert len(read(cache, f"{server}/400")) == 400
    assert Failing.asked == ["400", "400"]


def test_two_caches_fetch_the_same_shard_at_once(tmp_path, monkeypatch):
    """Training reads ahead while a set is evaluated: each has a cache of its own, in one folder."""
    both = threading.Barrier(2, timeout=30)

    def download(address, file):
        file.write(b"a" * 1000)
        both.wait()
        file.write(b"b" * 1000)

    monkeypatch.setattr(remote, "download", download)
    caches = [ShardCache(tmp_path, 10**6) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        contents = list(threads.map(lambda cache: read(cache, "s3://a/b.tar"), caches))
    assert contents == [b"a" * 1000 + b"b" * 1000] * 2
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_half_fetched_is_removed(server, tmp_path):
    old, new = (tmp_path / f"{remote.PART}{name}" for name in ("old", "new"))
    for part in (old, new):
        part.write_bytes(b"x" * 5000)
    os.utime(old, (0, 0))
    read(ShardCache(tmp_path, 1000), f"{server}/400")
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [400, 5000]
    assert new.exists()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def served(tmp_path):
    """Serve ``tmp_path`` over loopback HTTP; return the address."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("protocol", ["file", "http"])
@pytest.mark.parametrize("where", ["beside", "above"])
def test_names_and_templates_of_shards_at_an_address_are_fetched_too(tmp_path, served, protocol, where):
    """CLIP_benchmark's layout has them in the folder above; without them a class would be called "0"."""
    (tmp_path / "set/test").mkdir(parents=True)
    for n in range(2):
        with tarfile.open(tmp_path / f"set/test/{n}.tar", "w") as tar:
            for name, data in ((f"{n}.ppm", b"P6 2 2 255\n" + bytes(12)), (f"{n}.cls", str(n).encode())):
                about = tarfile.TarInfo(name)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    root = f"file://{tmp_path}" if protocol == "file" else served
    source = Path(f"{root}/set/test/{{0..1}}.tar")
    assert list(read_index(source, None, LoadingSettings(cache=tmp_path / "a")).names.values()) == ["0", "1"]
    folder = tmp_path / "set/test" if where == "beside" else tmp_path / "set"
    (folder / "classnames.txt").write_text("missile\nmissile\n")
    (folder / "zeroshot_classification_templates.txt").write_text("the {c}\n")
    (folder / "classes.json").write_text("<html>no such page</html>")
    index = read_index(source, None, LoadingSettings(cache=tmp_path / "b"))
    assert index.names == {"0": "missile", "1": "missile"}
    assert index.captions[1] == ["the missile"]


def test_shards_are_indexed_and_read_through_a_cache_that_holds_one(tmp_path):
    """By several threads, each of which removes the others' copies while they are read."""
    for n in range(6):
        with tarfile.open(tmp_path / f"{n}.tar", "w") as tar:
            for name, data in ((f"{n}.ppm", b"P6 2 2 255\n" + bytes(12)), (f"{n}.cls", b"a")):
                about = tarfile.TarInfo(name)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    source = Path(f"file://{tmp_path}/{{0..5}}.tar")
    index = read_index(source, None, LoadingSettings(cache=tmp_path / "cache", cache_gb=1e-9, workers=4))
    assert [len(index.read(row)) for row in range(6)] == [23] * 6
    assert len(list((tmp_path / "cache/shards").iterdir())) == 1


def test_other_protocols_are_fsspecs(tmp_path):
    import fsspec

    with fsspec.open("memory://set/a.tar", "wb") as file:
        file.write(b"abc")
    cache = ShardCache(tmp_path, 1000)
    assert read(cache, "memory://set/a.tar") == b"abc"
    with pytest.raises(UserError, match=r"no such file: check the address"):
        cache.open("memory://set/b.tar")
    with pytest.raises(UserError, match=r"'unheard://a.tar' cannot be read: .*not known"):
        cache.open("unheard://a.tar")
