"""Downloads from a real server on this machine: one that cuts, changes, refuses ranges or answers 404."""

from __future__ import annotations

import hashlib
import http.server
import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sellarec.data import download as module
from sellarec.data.download import download, published_checksum
from sellarec.errors import UserError

CONTENT = bytes(range(256)) * 4096


@dataclass
class Site:
    """What the server serves, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=lambda: {"/data.zip": CONTENT})
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers end
    has_ranges: bool = True
    has_length: bool = True
    tag: str = '"one"'
    statuses: list[int] = field(default_factory=list)  # of the next answers, instead of the file
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    before_answer: Callable[[], None] = lambda: None
    url: str = ""


@pytest.fixture
def site() -> Iterator[Site]:
    state = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            content = state.files.get(self.path)
            status = state.statuses.pop(0) if state.statuses and content is not None else 200
            if content is None or status != 200:
                self.send_error(404 if content is None else status)
                return
            state.before_answer()
            start = 0
            if wanted and state.has_ranges and self.headers.get("If-Range") == state.tag:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if state.has_length:
                self.send_header("Content-Length", str(len(content) - start))
            if state.tag:
                self.send_header("ETag", state.tag)
            self.end_headers()
            cut = state.cuts.pop(0) if state.cuts and self.path == "/data.zip" else len(content)
            self.wfile.write(content[start : start + cut])

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/data.zip"
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.01)


def get(site: Site, folder: Path, **more: str) -> Path:
    return download(site.url, folder, progress=lambda _: None, **more)


def of_data(site: Site) -> list[str | None]:
    return [wanted for path, wanted in site.asked if path == "/data.zip"]


def test_a_file_is_downloaded_once_and_its_hash_recorded(site, tmp_path):
    told: list[str] = []
    file = download(site.url, tmp_path / "new", progress=told.append)
    assert file.read_bytes() == CONTENT
    record = json.loads((tmp_path / "new/data.zip.sha256.json").read_text())
    assert record["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert record["url"] == site.url
    assert told[-1].startswith("data.zip: 1.0 of 1.0 MB, ")
    assert get(site, tmp_path / "new") == file
    assert of_data(site) == [None]
    assert {path.name for path in (tmp_path / "new").iterdir()} - {".data.zip.lock"} == {
        "data.zip",
        "data.zip.sha256.json",
    }


def test_progress_at_a_steady_rate(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 18)
    told: list[str] = []
    download(site.url, tmp_path, progress=told.append)
    assert len(told) == 5
    assert told[0].startswith("data.zip: 0.3 of 1.0 MB, ")
    assert told[0].endswith(" MB/s")


def test_a_cut_connection_is_resumed(site, tmp_path):
    site.cuts = [300_000, 200_000]
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert of_data(site) == [None, "bytes=300000-", "bytes=500000-"]


def test_a_later_run_goes_on_where_the_first_gave_up(site, tmp_path):
    site.cuts = [300_000] + [0] * module.TRIES
    with pytest.raises(UserError, match=r"the connection ended after 300,000 of 1,048,576 bytes \(6 tries\)"):
        get(site, tmp_path)
    assert not (tmp_path / "data.zip").exists()
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert of_data(site)[-1] == "bytes=300000-"


def test_a_server_without_ranges_starts_again(site, tmp_path):
    site.has_ranges, site.cuts = False, [300_000, 300_000]
    assert get(site, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("tag", ["", 'W/"weak"'])
def test_without_a_strong_validator_nothing_is_resumed(site, tmp_path, tag):
    site.tag, site.cuts = tag, [300_000]
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert of_data(site) == [None, None]


def test_a_file_that_changed_meanwhile_is_not_mixed(site, tmp_path):
    site.cuts = [300_000] + [0] * module.TRIES
    with pytest.raises(UserError):
        get(site, tmp_path)
    site.files["/data.zip"], site.tag = CONTENT[::-1], '"two"'
    assert get(site, tmp_path).read_bytes() == CONTENT[::-1]


def test_a_part_that_is_whole_already(site, tmp_path):
    site.cuts = [300_000] + [0] * module.TRIES
    with pytest.raises(UserError):
        get(site, tmp_path)
    (tmp_path / "data.zip.part").write_bytes(CONTENT)
    assert get(site, tmp_path).read_bytes() == CONTENT


def test_a_server_that_always_cuts_is_given_up(site, tmp_path):
    site.has_ranges, site.cuts = False, [500_000] * 20
    with pytest.raises(UserError, match="the connection ended after 500,000 of 1,048,576 bytes"):
        get(site, tmp_path)
    assert len(of_data(site)) == 1 + module.TRIES


def test_a_server_at_fault_for_a_while(site, tmp_path):
    site.statuses = [503, 500, 429]
    assert get(site, tmp_path).read_bytes() == CONTENT


def test_a_server_without_lengths(site, tmp_path):
    site.has_length = False
    assert get(site, tmp_path).read_bytes() == CONTENT


def test_no_such_file(site, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.zip can't be downloaded: the server answers 404 Not Found"):
        download(site.url.replace("data", "nothing"), tmp_path, progress=lambda _: None)
    assert len(site.asked) == 1


def test_no_such_server(tmp_path):
    with pytest.raises(UserError, match=r"can't be downloaded: .*refused.* \(6 tries\)"):
        download("http://127.0.0.1:9/data.zip", tmp_path, progress=lambda _: None)


@pytest.mark.parametrize("url", ["ftp://host/a.zip", "file:///etc/passwd", "https://host/", "https://host/..", "a.zip"])
def test_an_address_of_no_file(tmp_path, url):
    with pytest.raises(UserError, match="is no address of a file"):
        download(url, tmp_path, progress=lambda _: None)


def test_a_folder_that_cannot_be_written(site, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*data\.zip"):
        get(site, tmp_path / "file")


def fetch(url: str, folder: str) -> None:
    download(url, Path(folder), progress=lambda _: None)


def test_two_processes_at_once_download_once(site, tmp_path):
    processes = multiprocessing.get_context("spawn")
    workers = [processes.Process(target=fetch, args=(site.url, str(tmp_path))) for _ in range(2)]
    gate = threading.Event()
    site.before_answer = lambda: gate.wait(5) and None
    for worker in workers:
        worker.start()
    threading.Timer(1.5, gate.set).start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "data.zip").read_bytes() == CONTENT
    assert of_data(site) == [None]


@pytest.mark.parametrize("form", ["MD5 (data.zip) = {}", "{}  data.zip", "{} *data.zip", "{}"])
def test_the_published_md5(site, tmp_path, form):
    digest = hashlib.md5(CONTENT).hexdigest()
    site.files["/data.zip.md5"] = (form.format(digest) + "\n").encode()
    assert published_checksum(site.url) == f"md5:{digest}"
    get(site, tmp_path)
    assert json.loads((tmp_path / "data.zip.sha256.json").read_text())["published"] == f"md5:{digest}"


@pytest.mark.parametrize("text", [b"<html>nothing here</html>", b"0" * 32 + b"  other.zip\n", b""])
def test_a_checksum_file_that_says_nothing_of_the_file(site, text):
    site.files["/data.zip.md5"] = text
    assert published_checksum(site.url) is None


def test_a_wrong_published_md5_is_refused_with_both(site, tmp_path):
    site.files["/data.zip.md5"] = b"MD5 (data.zip) = " + b"0" * 32
    found = hashlib.md5(CONTENT).hexdigest()
    with pytest.raises(UserError, match=f"as downloaded from .* has the md5 {found}, but should have {'0' * 32}"):
        get(site, tmp_path)
    assert not (tmp_path / "data.zip").exists()
    assert not (tmp_path / "data.zip.part").exists()


def test_a_given_checksum(site, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    get(site, tmp_path / "a", checksum=f"sha256:{digest}")
    with pytest.raises(UserError, match=f"has the sha256 {digest}, but should have 00"):
        get(site, tmp_path / "b", checksum="sha256:00")
    with pytest.raises(UserError, match="give it as md5:HEX or sha256:HEX"):
        get(site, tmp_path / "c", checksum="00")


def test_a_file_that_changed_on_the_disk(site, tmp_path):
    file = get(site, tmp_path)
    file.write_bytes(b"other")
    was, found = hashlib.sha256(CONTENT).hexdigest(), hashlib.sha256(b"other").hexdigest()
    with pytest.raises(
        UserError, match=f"has changed: its SHA-256 is {found}, but was {was} .*Delete it to get it again"
    ):
        get(site, tmp_path)


def test_a_file_that_changed_at_the_server(site, tmp_path):
    get(site, tmp_path).unlink()
    site.files["/data.zip"] = b"other"
    with pytest.raises(UserError, match=r"has changed: .*Delete .*sha256\.json if the new file is the wanted one"):
        get(site, tmp_path)


def test_a_file_put_there_by_hand_needs_no_network(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"mine")
    told: list[str] = []
    download("http://127.0.0.1:9/data.zip", tmp_path, progress=told.append)
    assert "taken as it is" in told[0]
    assert json.loads((tmp_path / "data.zip.sha256.json").read_text())["bytes"] == 4
