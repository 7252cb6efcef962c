"""Files by path or URI, and the lines of text files: whole or damaged, plain, gzipped or in a zip."""

from __future__ import annotations

import gzip
import hashlib
import io
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sellarec.data import files
from sellarec.data.files import file_hash, file_hashes, is_file, line_blocks, lines, names_in, open_file
from sellarec.errors import UserError


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 8)
    monkeypatch.setattr(files, "PIECE_BYTES", 3)


def test_paths_and_uris(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\n")
    for given_path in (str(file), file.as_uri()):
        assert is_file(given_path)
        with open_file(given_path) as opened:
            assert opened.read() == b"one\n"
        assert file_hash(given_path) == hashlib.sha256(b"one\n").hexdigest()
    assert names_in(str(tmp_path)) == names_in(tmp_path.as_uri()) == ["a.txt"]
    assert names_in(str(file)) is None
    assert not is_file(str(tmp_path))
    with pytest.raises(UserError, match=r"Cannot read .*nothing.*Check that the file is there"):
        open_file(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"nosuch://a/b can't be opened"):
        is_file("nosuch://a/b")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_and_their_numbers(tmp_path, name, end):
    content = "\ufeffone\r\ntwo\n\nééé\nthe fifth line is longer than a block" + end
    (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(content.encode()))
    expected = [(1, "one"), (2, "two"), (3, ""), (4, "ééé"), (5, "the fifth line is longer than a block")]
    assert list(lines(str(tmp_path / name))) == expected


def test_lines_of_another_encoding_and_of_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b.txt", "1::Café\n2::b\n".encode("latin-1"))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        found = lines("a.zip (b.txt)", "latin-1", archive.open("b.txt"))
        assert list(found) == [(1, "1::Café"), (2, "2::b")]


def test_a_damaged_member_of_a_zip(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("b.txt", "one\ntwo\n")
    path.write_bytes(path.read_bytes().replace(b"two", b"twa"))
    with (
        zipfile.ZipFile(path) as archive,
        pytest.raises(UserError, match=r"a\.zip \(b\.txt\) is cut short or damaged after line \d \(Bad CRC"),
    ):
        list(lines("a.zip (b.txt)", stream=archive.open("b.txt")))


def test_no_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b""))
    assert list(lines(str(tmp_path / "a.txt"))) == list(lines(str(tmp_path / "b.txt.gz"))) == []


def test_the_members_of_a_gzip_follow_each_other(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"one\ntw") + gzip.compress(b"o\n"))
    assert [line for _, line in lines(str(tmp_path / "a.gz"))] == ["one", "two"]


@pytest.mark.usefixtures("small_blocks")
def test_another_encoding_is_told_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthree\n\xe9t\xe9\n")
    with pytest.raises(UserError, match=r"a\.txt, line 4: not utf-8 \(invalid continuation byte: b'\\xe9'\)"):
        list(lines(str(tmp_path / "a.txt")))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.999])
def test_half_a_gzip(tmp_path, share):
    whole = gzip.compress(
        b"".join(b"%d %s\n" % (i, hashlib.md5(b"%d" % i).hexdigest().encode()) for i in range(100_000))
    )
    (tmp_path / "a.gz").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"a\.gz is cut short or damaged after line [\d,]+ \(Truncated.*: get it again"):
        list(lines(str(tmp_path / "a.gz")))


def test_a_gzip_that_is_none(tmp_path):
    (tmp_path / "a.gz").write_bytes(b"plain text\n")
    with pytest.raises(UserError, match=r"a\.gz is cut short or damaged after line 0"):
        list(lines(str(tmp_path / "a.gz")))


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 8)
    monkeypatch.setattr(files, "PIECE_BYTES", 4096)
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"one\n" + bytes(2 << 20))
    with pytest.raises(UserError, match=r"a\.txt, line 2: no end of the line within 1 MiB"):
        list(lines(str(tmp_path / "a.txt")))
    (tmp_path / "b.csv").write_bytes(b'one\n"two\n' + b"three\n" * (1 << 20))
    with pytest.raises(UserError, match=r"b\.csv, line 2: no end of the row within 1 MiB.*every quote closed"):
        list(line_blocks(str(tmp_path / "b.csv"), quotes=True))


class HeldFile(io.BytesIO):
    """A file whose first ten bytes are at hand; to read on waits for `go_on`."""

    def __init__(self, content: bytes, go_on: threading.Event):
        super().__init__(content)
        self.go_on = go_on

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 10:
            self.go_on.wait(600)
        return super().read(size)


def test_an_abandoned_iterator_waits_for_no_thread(small_blocks):
    go_on = threading.Event()
    blocks = line_blocks("a.txt", HeldFile(b"a\n" * 100, go_on))
    assert next(blocks) == (1, b"a\n" * 4)
    closing = threading.Thread(target=blocks.close)
    closing.start()
    closing.join(60)
    is_waiting = closing.is_alive()
    go_on.set()
    assert not is_waiting


VALUES = st.text(alphabet='ab"\n,', max_size=12)


@given(rows=st.lists(VALUES, min_size=1), size=st.integers(1, 30))
def test_blocks_hold_whole_lines_and_whole_quotes(tmp_path_factory, rows, size):
    path: Path = tmp_path_factory.mktemp("blocks") / "a.csv"
    content = "".join('"' + row.replace('"', '""') + '"\n' for row in rows).encode()
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", size)
        patch.setattr(files, "PIECE_BYTES", 4)
        for quotes in (False, True):
            blocks = list(line_blocks(str(path), quotes=quotes))
            assert b"".join(block for _, block in blocks) == content
            before = 0
            for first, block in blocks:
                assert first == before + 1
                before += block.count(b"\n")
                assert block.endswith(b"\n")
                assert not quotes or block.count(b'"') % 2 == 0


def test_files_of_one_name_in_two_folders_have_hashes_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.csv").write_text(folder)
    found = file_hashes([str(tmp_path / folder / "x.csv") for folder in ("a", "b")])
    assert sorted(found) == ["a/x.csv", "b/x.csv"] and len(set(found.values())) == 2
    assert list(file_hashes([str(tmp_path / "a/x.csv")])) == ["x.csv"] and file_hashes([]) == {}
