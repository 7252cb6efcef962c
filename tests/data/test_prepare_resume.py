"""A preparation that was cut off goes on where it stopped, and comes to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from prepared import files_of, prepare_into, rules, source_of

from sellarec.data import prepare as prepare_module
from sellarec.data.log import Log
from sellarec.data.phases import Rules
from sellarec.data.raw import Source
from sellarec.data.sources.tables import Columns, open_tables
from sellarec.errors import UserError

ROWS = 120
RULES = rules(k_core=2, split="leave-one-out")


class CutOff(Exception):
    pass


def rows() -> pa.Table:
    """Of these the k-core takes several cuts: a chain in which each leaves out the next, beside a dense part."""
    index = np.arange(ROWS - 40)
    user = np.concatenate([index % 9, np.repeat(np.arange(20), 2) + 100])
    item = np.concatenate([index % 11, np.arange(40) // 2 + np.arange(40) % 2 + 100])
    columns = {
        "user": user,
        "item": item,
        "timestamp": 1_600_000_000 + np.arange(ROWS) // 2,
        "rating": np.arange(ROWS) % 5 + 1.0,
    }
    return pa.table(columns | {"city": [f"city {n % 4}" for n in range(ROWS)]})


def small_source() -> Source:
    items = pa.table({"item": [1, 2, 50], "title": ["One", "Two", "Fifty"]})
    return source_of(rows(), items, parts=3, rows_about=80, features=("city",))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(prepare_module, "PIECE_ROWS", 20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[str], Log]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "PIECE_ROWS", 20)
        every = watch(patch)
        return every, prepared(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def every(whole) -> list[str]:
    """All pieces, in the order in which they are carried out."""
    return whole[0]


@pytest.fixture(scope="module")
def undisturbed(whole) -> dict[str, bytes]:
    """The files of a log that was prepared at one go."""
    return files_of(whole[1].directory)


def prepared(folder: Path, chosen: Rules = RULES) -> Log:
    return prepare_into(folder, small_source(), chosen, start_ray=None)


def watch(monkeypatch, *, fail_at: int | None = None, after_work: bool = True) -> list[str]:
    """Which pieces are carried out, as PHASE/NUMBER. At piece `fail_at` it is cut off: when all but its mark is written,
    or before it has begun."""
    done: list[str] = []
    carry_out = prepare_module._carry_out

    def watched(piece, mark):
        if len(done) == fail_at:
            if after_work:
                piece()
            raise CutOff
        carry_out(piece, mark)
        done.append(f"{mark.parent.name}/{mark.stem}")

    monkeypatch.setattr(prepare_module, "_carry_out", watched)
    return done


def test_the_whole_has_many_pieces_and_several_cuts(whole):
    every, log = whole
    assert len(every) == len(set(every)) > 60
    assert len({piece.split("/")[0] for piece in every if piece.startswith("k-core")}) > 4
    assert log.facts["dropped"] == {"below the k-core": 40}


@pytest.mark.parametrize("after_work", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_no_finished_piece_is_done_again_and_the_log_is_the_same(
    tmp_path, monkeypatch, undisturbed, every, share, after_work
):
    with monkeypatch.context() as patch:
        before = watch(patch, fail_at=int(share * len(every)), after_work=after_work)
        with pytest.raises(CutOff):
            prepared(tmp_path / "log")
    assert not (tmp_path / "log" / "manifest.json").exists()
    with monkeypatch.context() as patch:
        after = watch(patch)
        log = prepared(tmp_path / "log")
    assert before + after == every
    assert files_of(log.directory) == undisturbed


def test_a_cut_of_the_k_core_may_be_done_twice(tmp_path, monkeypatch, undisturbed, every):
    for place in [n for n, piece in enumerate(every) if piece.startswith("k-core")][::5]:
        folder = tmp_path / str(place)
        with monkeypatch.context() as patch:
            watch(patch, fail_at=place)
            with pytest.raises(CutOff):
                prepared(folder)
        assert files_of(prepared(folder).directory) == undisturbed, every[place]


def test_it_may_be_cut_off_again_and_again(tmp_path, monkeypatch, undisturbed):
    tries = 0
    while True:
        with monkeypatch.context() as patch:
            watch(patch, fail_at=7)
            tries += 1
            try:
                log = prepared(tmp_path)
                break
            except CutOff:
                pass
    assert tries > 9
    assert files_of(log.directory) == undisturbed


@pytest.mark.parametrize("change", ["rule", "hashes", "bad rows", "source", "previous"])
def test_pieces_that_were_made_for_something_else_are_not_taken(tmp_path, monkeypatch, change):
    earlier = prepared(tmp_path / "earlier").directory
    with monkeypatch.context() as patch:
        watch(patch, fail_at=40)
        with pytest.raises(CutOff):
            prepared(tmp_path / "log")
    source, chosen, settings = small_source(), RULES, {}
    if change == "rule":
        chosen = rules(split="leave-one-out", k_core=2, history_cap=2)
    elif change == "hashes":
        settings = {"hashes": {"a.csv": "00ff"}}
    elif change == "bad rows":
        settings = {"bad_rows": "drop"}
    elif change == "source":  # read in another way, from the same files
        table = rows().set_column(3, "rating", pa.array(np.ones(ROWS)))
        source = Source(**vars(source) | {"interactions": source_of(table, parts=3).interactions})
    else:
        settings = {"previous": earlier}
    wanted = prepare_into(tmp_path / "anew", source, chosen, start_ray=None, **settings)
    done = watch(monkeypatch)
    log = prepare_into(tmp_path / "log", source, chosen, start_ray=None, **settings)
    assert "reading/000000" in done
    assert files_of(log.directory) == files_of(wanted.directory)


def test_nothing_of_an_earlier_try_is_left_in_the_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "PIECE_ROWS", 5)
        patch.setattr("prepared.discard_work", lambda folder: None)  # as if cut off there
        many = files_of(prepared(tmp_path / "log").directory)
    monkeypatch.setattr(prepare_module, "PIECE_ROWS", 1000)
    few = files_of(prepared(tmp_path / "log").directory)
    assert len(few) < len(many)
    assert few == files_of(prepared(tmp_path / "other").directory)


@pytest.mark.parametrize("name", ["work", "items", "interactions"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, name):
    kept = tmp_path / name / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("dear to me")
    with pytest.raises(UserError, match=f"holds {name}, which preparation would overwrite"):
        prepared(tmp_path)
    assert files_of(tmp_path) == {f"{name}/mine.txt": b"dear to me"}


def test_a_log_is_whole_before_its_pieces_are_deleted(tmp_path, monkeypatch, undisturbed):
    def delete_some(folder, **_):
        for path in sorted((tmp_path / "work" / "rows").rglob("*.arrow")):
            path.unlink()
        raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.shutil, "rmtree", delete_some)
        with pytest.raises(CutOff):
            prepared(tmp_path)
    left = {name: content for name, content in files_of(tmp_path).items() if not name.startswith("work/")}
    assert left == undisturbed
    # a run that had not yet noted that the log stands makes it once more
    assert files_of(prepared(tmp_path).directory) == undisturbed


KILLED = """
import os, signal, sys
from pathlib import Path
from prepared import prepare_into
from sellarec.data import prepare as prepare_module
from test_prepare_resume import RULES, table_source

prepare_module.PIECE_ROWS = 20
carry_out, done = prepare_module._carry_out, []

def carry_out_some(piece, mark):
    if len(done) == 45:
        piece()
        os.kill(os.getpid(), signal.SIGKILL)
    carry_out(piece, mark)
    done.append(mark)

prepare_module._carry_out = carry_out_some
prepare_into(Path(sys.argv[1]), table_source(Path(sys.argv[2])), RULES, start_ray=None)
"""


def table_source(folder: Path) -> Source:
    columns = Columns(user="user", item="item", timestamp="timestamp", rating="rating", features=("city",))
    source = open_tables(str(folder), columns)
    return Source(**vars(source) | {"rows_about": 80})


def test_another_process_goes_on_after_a_kill(tmp_path, monkeypatch):
    files = tmp_path / "files"
    files.mkdir()
    for number in range(3):
        rows().slice(40 * number, 40).to_pandas().to_csv(files / f"{number}.csv", index=False)
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "7"}
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "log"), str(files)]
    killed = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    marks = {path: path.stat().st_mtime_ns for path in (tmp_path / "log" / "work" / "done").rglob("*.json")}
    assert len(marks) == 45
    held: dict[Path, int] = {}

    def look_and_discard(folder: Path) -> None:
        held.update({path: path.stat().st_mtime_ns for path in marks})
        prepare_module.discard_work(folder)

    with monkeypatch.context() as patch:
        patch.setattr("prepared.discard_work", look_and_discard)
        log = prepare_into(tmp_path / "log", table_source(files), RULES, start_ray=None)
    assert held == marks  # not one was written again
    other = prepare_into(tmp_path / "other", table_source(files), RULES, start_ray=None)
    assert files_of(log.directory) == files_of(other.directory)
    assert json.loads((log.directory / "manifest.json").read_text())["rows"]["train"] > 0
