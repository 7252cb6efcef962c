"""Artifacts: whole or none, found by fingerprint, one writer at a time."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sellarec import artifacts
from sellarec.artifacts import Place, Store, check_output, fingerprint, free_bytes
from sellarec.errors import StageFailed, UserError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def reordered(value, generator: random.Random):
    if isinstance(value, dict):
        pairs = [(key, reordered(inner, generator)) for key, inner in value.items()]
        generator.shuffle(pairs)
        return dict(pairs)
    return [reordered(inner, generator) for inner in value] if isinstance(value, list) else value


@settings(max_examples=50)
@given(st.dictionaries(st.text(), PLAIN, max_size=5), st.randoms(use_true_random=False))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(facts, generator):
    mark = fingerprint(facts)
    assert mark == fingerprint(reordered(facts, generator)) == fingerprint(json.loads(json.dumps(facts)))
    assert len(mark) == 16 and int(mark, 16) >= 0


def test_a_fingerprint_tells_facts_apart():
    different = [{}, {"a": 1}, {"a": 1.5}, {"a": "1"}, {"b": 1}, {"a": [1, 2]}, {"a": [2, 1]}, {"a": None}]
    assert len({fingerprint(facts) for facts in different}) == len(different)


@pytest.fixture(params=["path", "URI"])
def place(request, tmp_path) -> Place:
    folder = tmp_path / "a folder with spaces & ünicode"
    return Place.of(str(folder) if request.param == "path" else folder.as_uri())


def test_a_place_writes_reads_lists_and_deletes(place, tmp_path):
    assert place.is_local and str(place) == str(tmp_path / "a folder with spaces & ünicode")
    assert place.names() == [] and place.read_json("a.json") is None
    (place / "inner").write_json("a.json", {"x": [1, "é"]})
    place.write_text("b.txt", "first")
    place.write_text("b.txt", "sécond")
    assert (place / "inner").read_json("a.json") == {"x": [1, "é"]}
    assert (place.folder / "b.txt").read_text(encoding="utf-8") == "sécond"
    assert place.names() == ["b.txt", "inner"], "no unfinished file stays behind"
    assert place.local() == place.folder == (place / "inner").folder.parent
    place.delete("inner", "b.txt", "nothing")
    assert place.names() == []


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Place.of(str(tmp_path)).write_json("a.json", {"loss": float("nan")})


def test_relative_places_are_taken_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Place.of("runs").folder == tmp_path / "runs"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Place.of("~/runs").folder == tmp_path / "runs"


def test_an_object_store_is_a_place_and_no_local_one():
    place = Place.of("s3://bucket/prefix/") / "artifacts"
    assert str(place) == "s3://bucket/prefix/artifacts" and not place.is_local
    assert free_bytes(place) is None


def test_a_place_on_another_file_system_is_copied_there_and_back():
    """fsspec's file system in memory stands for an object store: what isn't local goes the same way."""
    place = Place.of(f"fsspec+memory://bucket-{os.getpid()}") / "artifact"
    assert not place.is_local
    with place.writing() as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "rows").write_bytes(b"123")
        assert place.names() == []
    assert place.names() == ["inner"]
    place.write_json("manifest.json", {"a": 1})
    assert place.read_json("manifest.json") == {"a": 1}
    assert (place.local() / "inner" / "rows").read_bytes() == b"123"
    assert place.local() == place.local(), "downloaded once"
    with artifacts.lease(place, print):
        assert "lease.json" in place.names()
    place.delete("inner", "manifest.json", "nothing")
    assert place.names() == []


def test_an_artifact_without_a_manifest_does_not_count(tmp_path):
    store = Store(Place.of(str(tmp_path)))
    place = store.place("collab", "0123")
    assert place.folder == tmp_path / "artifacts" / "collab-0123"

    class Killed(BaseException):
        pass

    with pytest.raises(Killed), artifacts.lease(place, print), place.writing() as folder:
        (folder / "half.txt").write_text("ha")
        raise Killed
    assert store.manifest("collab", "0123") is None
    assert "lease.json" not in place.names(), "an error ends the lease"
    place.write_json("manifest.json", {"rows": 3})
    assert store.manifest("collab", "0123") == {"rows": 3}


def test_a_workspace_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for workspace in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/runs")):
        with pytest.raises(UserError, match=f"{workspace} can't be written to.*--workspace"):
            Store(Place.of(str(workspace))).check_writable()
    Store(Place.of(str(tmp_path / "new"))).check_writable()
    assert list((tmp_path / "new").iterdir()) == []


HOLD = """
import sys, time
from sellarec.artifacts import Place, Store, lease
place = Store(Place.of(sys.argv[1])).place("stage", "mark")
with lease(place, lambda text: print("waits", text, flush=True)):
    print("holds", flush=True)
    sys.stdin.readline()
    place.write_json("manifest.json", {"by": sys.argv[2]})
print("done", flush=True)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that takes the lease of one artifact, and gives it back when it is written a line."""
    started = []

    def start(name: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_lease_of_a_live_process_is_waited_for(hold, tmp_path):
    first = hold("first")
    assert first.stdout.readline() == "holds\n"
    second = hold("second")
    said = second.stdout.readline()
    assert said.startswith("waits") and str(first.pid) in said and "stage-mark" in said
    assert Store(Place.of(str(tmp_path))).manifest("stage", "mark") is None
    first.stdin.write("\n")
    first.stdin.flush()
    assert second.stdout.readline() == "holds\n"
    assert first.stdout.readline() == "done\n"
    second.stdin.write("\n")
    second.stdin.flush()
    assert second.stdout.readline() == "done\n"
    assert Store(Place.of(str(tmp_path))).place("stage", "mark").names() == ["manifest.json"]


def test_the_lease_of_a_dead_process_is_taken_over_at_once(hold, tmp_path):
    owner = hold("owner")
    assert owner.stdout.readline() == "holds\n"
    owner.kill()
    owner.wait()
    store = Store(Place.of(str(tmp_path)))
    place = store.place("stage", "mark")
    assert place.names() == ["lease.json"]
    said: list[str] = []
    start = time.monotonic()
    with artifacts.lease(place, said.append):
        assert place.read_json("lease.json")["pid"] == os.getpid()
    assert said == [] and time.monotonic() - start < 1
    assert place.names() == []


def test_the_lease_of_another_host_is_taken_over_once_it_is_not_renewed(tmp_path):
    store = Store(Place.of(str(tmp_path)))
    place = store.place("stage", "mark")
    theirs = {"host": "another-host", "pid": 1, "token": "x"}
    place.write_json("lease.json", {**theirs, "renewed": time.time() - artifacts.LEASE_SECONDS + 1.5})
    said: list[str] = []
    with artifacts.lease(place, said.append):
        assert place.read_json("lease.json")["token"] != "x"
    assert len(said) == 1 and "another-host" in said[0]


def test_a_held_lease_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "LEASE_SECONDS", 0.8)
    store = Store(Place.of(str(tmp_path)))
    place = store.place("stage", "mark")
    with artifacts.lease(place, print):
        first = place.read_json("lease.json")["renewed"]
        time.sleep(1)
        assert place.read_json("lease.json")["renewed"] > first
    assert place.names() == []


def swapped(folder: Path) -> Path:
    """Storage that fails: a file stands in the place of a folder."""
    away = folder.with_name("away")
    folder.rename(away)
    folder.touch()
    return away


def test_a_lease_is_held_on_when_storage_was_away_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "LEASE_SECONDS", 0.4)
    place = Place.of(str(tmp_path / "x"))
    with artifacts.lease(place, print) as is_held:
        away = swapped(tmp_path / "x")
        time.sleep(0.5)
        (tmp_path / "x").unlink()
        away.rename(tmp_path / "x")
        old = place.read_json("lease.json")["renewed"]
        time.sleep(0.5)
        assert is_held() and place.read_json("lease.json")["renewed"] > old


def test_a_lease_is_not_written_where_its_folder_has_gone(tmp_path, monkeypatch):
    """A folder that is made where storage is not mounted would pass for the artifact."""
    monkeypatch.setattr(artifacts, "LEASE_SECONDS", 0.4)
    place, away = Place.of(str(tmp_path / "w" / "x")), tmp_path / "away"
    with artifacts.lease(place, print) as is_held:
        (tmp_path / "w").rename(away)
        time.sleep(0.5)
        assert not (tmp_path / "w").exists()
        with pytest.raises(FileNotFoundError, match="its storage is away"):
            place.reach()
        away.rename(tmp_path / "w")
        place.reach()
        old = place.read_json("lease.json")["renewed"]
        time.sleep(0.5)
        assert is_held() and place.read_json("lease.json")["renewed"] > old


def test_names_of_what_is_no_folder_are_not_none(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(NotADirectoryError):
            Place.of(str(path)).names()


def test_writing_is_tried_again_until_storage_is_back(tmp_path):
    folder, said = tmp_path / "x", []
    folder.mkdir()
    away = swapped(folder)

    def bring_back() -> None:
        folder.unlink()
        away.rename(folder)

    timer = threading.Timer(0.3, bring_back)
    timer.start()
    artifacts.persist("writing a.json", lambda: Place.of(str(folder)).write_text("a.json", "1"), 5, said.append)
    timer.join()
    assert (folder / "a.json").read_text() == "1"
    assert len(said) == 1 and said[0].startswith("writing a.json failed (") and said[0].endswith("tries again in 1 s")


def test_storage_that_stays_away_is_a_failure_with_its_cause(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(StageFailed, match=r"and again for 0.5 s \(storage_timeout\): .*x"):
        artifacts.persist("writing", lambda: Place.of(str(tmp_path / "x")).write_text("a", ""), 0.5, lambda line: None)


def test_pauses_double_and_add_up_to_what_was_given():
    assert list(artifacts.pauses(100)) == [1, 2, 4, 8, 16, 30, 30, 9]
    assert list(artifacts.pauses(0)) == []


def test_a_lease_that_another_took_over_is_neither_renewed_nor_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "LEASE_SECONDS", 0.8)
    store = Store(Place.of(str(tmp_path)))
    place = store.place("stage", "mark")
    theirs = {"host": "another-host", "pid": 1, "token": "theirs", "renewed": time.time()}
    with artifacts.lease(place, print) as is_held:
        assert is_held()
        place.write_json("lease.json", theirs)
        assert not is_held()
        time.sleep(0.5)
    assert place.read_json("lease.json") == theirs


def test_of_many_that_want_a_lease_one_at_a_time_has_it(tmp_path):
    store = Store(Place.of(str(tmp_path)))
    place = store.place("stage", "mark")
    inside: list[int] = []
    most = []

    def take(number: int) -> None:
        with artifacts.lease(place, lambda text: None):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.2)
            inside.remove(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_a_lease_that_disappears_while_it_is_looked_at_is_no_error(tmp_path):
    place = Place.of(str(tmp_path))
    ended = threading.Event()

    def flicker() -> None:
        while not ended.is_set():
            place.write_json("lease.json", {"pid": 1})
            place.delete("lease.json")

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        assert all(place.read_json("lease.json") in (None, {"pid": 1}) for _ in range(2000))
    finally:
        ended.set()
        thread.join()


def test_free_bytes_are_told_of_a_place_that_is_not_there_yet(tmp_path):
    assert free_bytes(Place.of(str(tmp_path / "a" / "b"))) > 0


def test_a_workspace_of_no_known_kind_is_refused():
    with pytest.raises(UserError, match="foo://bar can't be written to"):
        Store(Place.of("foo://bar")).check_writable()


def test_a_file_that_cannot_take_an_outcome_is_refused_before_the_work(tmp_path):
    check_output(tmp_path / "new/folder/results.json", "--out")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", tmp_path / "new/folder"]
    (tmp_path / "old.json").write_text("what it holds")
    check_output(tmp_path / "old.json", "--out")
    assert (tmp_path / "old.json").read_text() == "what it holds"
    for path in (tmp_path / "new", tmp_path / "old.json" / "results.json", Path("/proc/results.json")):
        with pytest.raises(UserError, match=f"--out is '{path}', which can't be written"):
            check_output(path, "--out")
