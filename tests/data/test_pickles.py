"""The pickle reader: reads what pandas writes, executes nothing."""

from __future__ import annotations

import contextlib
import copyreg
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sellarec.data.pickles import read_pickled_frame
from sellarec.errors import UserError


def frame() -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "uid": np.array([3, 1, 2], dtype=np.int64),
            "flag": np.array([0.5, np.nan, 2.0]),
            "seen": np.array([True, False, True]),
            "his": [[0], [0, np.int64(7)], np.array([0, 7, 9])],
            "his_title": [[""], ["", np.str_("Heat (1995)")], np.array(["", "Heat (1995)", "Amélie"])],
            "title": pd.Series(["Amélie", "Heat (1995)", None], index=[5, 6, 9], dtype=object),
        },
        index=[5, 6, 9],
    )
    table.columns = pd.Index(list(table.columns), dtype=object)
    return table


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_a_frame_of_every_binary_protocol(protocol):
    table = read_pickled_frame(pickle.dumps(frame(), protocol=protocol), "a.pkl")
    assert table.to_pydict() == {
        "uid": [3, 1, 2],
        "flag": [0.5, None, 2.0],
        "seen": [True, False, True],
        "his": [[0], [0, 7], [0, 7, 9]],
        "his_title": [[""], ["", "Heat (1995)"], ["", "Heat (1995)", "Amélie"]],
        "title": ["Amélie", "Heat (1995)", None],
    }


def test_reads_a_frame_with_a_default_index_and_no_rows():
    table = frame().iloc[:0].reset_index(drop=True)
    assert read_pickled_frame(pickle.dumps(table), "a.pkl").num_rows == 0


class Reduces:
    """Runs a shell command when unpickled by pickle.loads."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def attacks(marker: Path) -> dict[str, bytes]:
    command = f"touch {marker}"
    line = command.encode()
    return {
        "reduce in a cell": pickle.dumps(pd.DataFrame({"his": [[Reduces(marker)]]}), protocol=4),
        "reduce, protocol 0": b"cos\nsystem\n(S'" + line + b"'\ntR.",
        "reduce, protocol 2": pickle.dumps(Reduces(marker), protocol=2),
        "stack global": b"\x80\x04" + text("posix") + text("system") + b"\x93" + text(command) + b"\x85R.",
        "dotted global": b"\x80\x04" + text("numpy") + text("dtype.os.system") + b"\x93" + text(command) + b"\x85R.",
        "name in two halves": b"\x80\x02cnumpy.core\nmultiarray.os.system\n" + text(command) + b"\x85R.",
        "build": b"\x80\x04cpandas.core.frame\nDataFrame\n)\x81"
        + b"}(" + text("__setstate__") + b"cos\nsystem\nub" + text(command) + b"b.",
        "build on a class": b"\x80\x02cpandas.core.frame\nDataFrame\n}(" + text("__init__") + b"N" + b"ub.",
        "build on a function": b"\x80\x02cnumpy\ndtype\n}(" + text("__code__") + b"N" + b"ub.",
        "instance": b"(S'" + line + b"'\nios\nsystem\n.",
        "instance without its text": b"(ios\nsystem\n.",
        "object": b"(cos\nsystem\nS'" + line + b"'\no.",
        "object of an allowed name": b"(cnumpy\ndtype\n" + text("f8") + b"o.",
        "new object": b"\x80\x02cos\nsystem\n" + text(command) + b"\x85\x81.",
        "new object with keywords": b"\x80\x04" + text("os") + text("system") + b"\x93)}\x92.",
        "extension": b"\x80\x02\x82\xf0" + text(command) + b"\x85R.",
        "extension of two bytes": b"\x80\x02\x83\xf0\x00" + text(command) + b"\x85R.",
        "extension of four bytes": b"\x80\x02\x84\xf0\x00\x00\x00" + text(command) + b"\x85R.",
        "persistent id": b"\x80\x02Pos.system\n.",
        "eval": pickle.dumps(eval, protocol=2)[:-1] + text(f"__import__('os').system('{command}')") + b"\x85R.",
        "reduce of a reduce": b"\x80\x02cnumpy\ndtype\n" + text("f8") + b"\x85R" + text(command) + b"\x85R.",
        "dtype of objects in a buffer": b"\x80\x04cnumpy.core.numeric\n_frombuffer\n(C\x08AAAAAAAA"
        + b"cnumpy\ndtype\n" + text("O8") + b"\x85RK\x01\x85" + text("C") + b"tR.",
        "dtype by expression": b"\x80\x02cnumpy\ndtype\n" + text("O8,O8") + b"\x85R.",
    }  # fmt: skip


@pytest.fixture
def extension_code():
    """A process in which the extension code 240 already stands for os.system, as an unpickler would look it up."""
    copyreg.add_extension("os", "system", 240)
    copyreg._extension_cache[240] = os.system
    yield
    copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_refuses_without_executing(name, tmp_path, extension_code):
    marker = tmp_path / "executed"
    with pytest.raises(UserError, match=r"^a\.pkl (holds|is not a pickled)"):
        read_pickled_frame(attacks(marker)[name], "a.pkl")
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path, extension_code):
    """Python's own unpickler does execute them, so that the test above tests something."""
    for name in ("reduce in a cell", "reduce, protocol 0", "stack global", "instance", "object", "extension"):
        marker = tmp_path / name.replace(" ", "_").replace(",", "")
        pickle.loads(attacks(marker)[name])
        assert marker.exists(), name


def test_names_what_is_refused():
    with pytest.raises(
        UserError, match=r"^x\.pkl holds os\.system, which is not plain data; refused without executing"
    ):
        read_pickled_frame(b"\x80\x02cos\nsystem\n.", "x.pkl")


@pytest.mark.parametrize("keep", [0, 1, 2, 30, 200, -100, -1])
def test_a_truncated_pickle_is_refused(keep):
    data = pickle.dumps(frame(), protocol=5)
    with pytest.raises(UserError, match="truncated or is no pickle"):
        read_pickled_frame(data[:keep], "a.pkl")


@pytest.mark.parametrize(
    "value", [{"a": 1}, (1, 2), [[1]], [{"a": 1}], 1 + 2j, [np.array([1])], np.datetime64("2001-01-01")], ids=str
)
def test_cells_must_be_plain_and_flat(value):
    table = pd.DataFrame({"his": pd.Series([value], dtype=object)})
    table.columns = pd.Index(["his"], dtype=object)
    with pytest.raises(UserError):
        read_pickled_frame(pickle.dumps(table), "a.pkl")


def test_repetition_by_reference_is_bounded():
    """A list that many rows share is written once, so a small file could ask for any amount of memory."""
    shared = [0] * 3_000
    table = pd.DataFrame({"his": pd.Series([shared] * 3_000, dtype=object)})
    table.columns = pd.Index(["his"], dtype=object)
    data = pickle.dumps(table)
    assert len(data) < 100_000
    with pytest.raises(UserError, match="repeated beyond"):
        read_pickled_frame(data, "a.pkl")


def test_an_array_larger_than_its_data_is_refused():
    huge = b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    huge += (
        b"(K\x01\x8a\x06\x00\x00\x00\x00\x00\x10K\x01\x86cnumpy\ndtype\n" + text("f8") + b"\x85R\x89C\x08AAAAAAAAtb."
    )
    with pytest.raises(UserError, match="an array of 8 bytes where its shape"):
        read_pickled_frame(huge, "a.pkl")


def test_text_must_be_unicode():
    table = pd.DataFrame({"his_title": pd.Series([np.array(["ab"])], dtype=object)})
    table.columns = pd.Index(["his_title"], dtype=object)
    data = pickle.dumps(table).replace("ab".encode("utf-32-le"), b"\xff\xff\xff\xffb\0\0\0")
    with pytest.raises(UserError, match="text that is no Unicode"):
        read_pickled_frame(data, "a.pkl")


SAMPLES = [pickle.dumps(frame(), protocol=protocol) for protocol in (2, 4, 5)]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_is_refused_or_harmless(sample, changes):
    data = bytearray(sample)
    for place, value in changes:
        data[min(int(place * len(data)), len(data) - 1)] = value
    with contextlib.suppress(UserError):
        read_pickled_frame(bytes(data), "a.pkl")
