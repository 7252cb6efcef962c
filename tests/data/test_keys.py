"""Keys of ids, and the numbers they lead to."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sellarec.data.keys import keys_of, look_up, uniform, write_numbering

# Beside any texts such that share beginnings, lie about a word's length or differ in their zeros alone.
TEXTS = st.one_of(
    st.text(max_size=80), st.integers(0, 70).map("a".__mul__), st.integers(0, 17).map("\0".__mul__), st.just("")
)
NUMBERS = st.integers(-(2**63), 2**63 - 1)


def strings(values: list[str]) -> pa.Array:
    return pa.array(values, pa.string())


@given(st.lists(TEXTS, min_size=1, max_size=20), st.data())
def test_a_key_of_a_text_is_a_function_of_it_alone(texts, data):
    keys = keys_of(strings(texts))
    assert keys.dtype == np.uint64
    assert keys.tolist() == [int(keys_of(strings([text]))[0]) for text in texts]
    assert keys_of(pa.array(texts, pa.large_string())).tolist() == keys.tolist()
    start = data.draw(st.integers(0, len(texts)))
    assert keys_of(strings(texts).slice(start)).tolist() == keys[start:].tolist()
    assert len(set(keys.tolist())) == len(set(texts))


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.data())
def test_a_key_of_a_number_is_a_function_of_it_alone(numbers, data):
    keys = keys_of(pa.array(numbers, pa.int64()))
    assert keys.dtype == np.uint64
    assert keys.tolist() == [int(keys_of(pa.array([number], pa.int64()))[0]) for number in numbers]
    start = data.draw(st.integers(0, len(numbers)))
    assert keys_of(pa.array(numbers, pa.int64()).slice(start)).tolist() == keys[start:].tolist()
    assert len(set(keys.tolist())) == len(set(numbers))


def test_narrower_numbers_have_the_same_keys():
    for narrow in (pa.int8(), pa.uint8(), pa.int32(), pa.uint32()):
        assert keys_of(pa.array([0, 5, 100], narrow)).tolist() == keys_of(pa.array([0, 5, 100], pa.int64())).tolist()


def test_keys_are_pinned():
    # Logs that are extended, and pieces that several machines make, rest on these values.
    assert keys_of(pa.array([0, 1, -1], pa.int64())).tolist() == PINNED_NUMBERS
    assert keys_of(strings(["", "a", "12345678", "123456789", "Zoë"])).tolist() == PINNED_TEXTS


PINNED_NUMBERS = [16294208416658607535, 10451216379200822465, 16490336266968443936]
PINNED_TEXTS = [
    16294208416658607535,
    13971819848363002055,
    17608736340504220676,
    5222994320443514605,
    11257316561299227794,
]


def test_no_ids_have_no_keys():
    for empty in (strings([]), pa.array([], pa.int64()), strings(["a", "b"]).slice(2)):
        assert keys_of(empty).tolist() == [] and keys_of(empty).dtype == np.uint64


@pytest.mark.parametrize("form", ["user-{}", "A{:027d}", "{:0>9}" + "x" * 64])
def test_a_million_ids_have_a_million_keys(form):
    ids = strings([form.format(number) for number in range(1_000_000)])
    assert len(np.unique(keys_of(ids))) == 1_000_000


def test_keys_spread_over_any_number_of_partitions():
    for ids in (
        pa.array(np.arange(100_000)),
        pa.array(np.arange(100_000) * 4096),
        strings(list(map(str, range(100_000)))),
    ):
        for partitions in (2, 7, 64):
            sizes = np.bincount(keys_of(ids) % np.uint64(partitions), minlength=partitions)
            mean = 100_000 / partitions
            assert np.abs(sizes - mean).max() < 5 * np.sqrt(mean)


@given(st.sets(NUMBERS, max_size=30), st.lists(NUMBERS, max_size=10))
def test_known_keys_lead_to_their_numbers_and_others_to_what_stands_for_them(tmp_path_factory, known, others):
    path = tmp_path_factory.mktemp("numbers") / "item"
    ids = pa.array(sorted(known), pa.int64())
    write_numbering(keys_of(ids), np.arange(len(ids)), path)
    assert look_up(keys_of(ids), path).tolist() == list(range(len(ids)))
    assert look_up(keys_of(ids)[::-1], path).tolist() == list(range(len(ids)))[::-1]
    wanted = [*others, *others]
    number = {value: place for place, value in enumerate(sorted(known))}
    found = look_up(keys_of(pa.array(wanted, pa.int64())), path, unknown=-1)
    assert found.dtype == np.int64 and found.tolist() == [number.get(value, -1) for value in wanted]
    if set(others) - known:
        with pytest.raises(KeyError, match="a key without a number"):
            look_up(keys_of(pa.array(others, pa.int64())), path)
    assert look_up(np.empty(0, np.uint64), path).tolist() == []


ROW_IDS = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=20)


@given(ROW_IDS, st.lists(st.integers(0, 1 << 31), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_uniform_is_a_function_of_row_and_salt(ids, salt, generator):
    whole = uniform(np.array(ids), *salt)
    assert ((whole >= 0) & (whole < 1)).all()
    order = list(range(len(ids)))
    generator.shuffle(order)
    np.testing.assert_array_equal(uniform(np.array(ids)[order], *salt), whole[order])
    assert uniform(np.array(ids[:1]), *salt)[0] == whole[0]


def test_uniform_is_uniform_and_rows_and_salts_are_independent():
    n = 40_000
    draws = np.stack([uniform(np.arange(n), *salt) for salt in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]])
    counts = np.stack([np.histogram(x, 50, (0, 1))[0] for x in draws])
    chi_squared = ((counts - n / 50) ** 2 / (n / 50)).sum(1)
    assert (chi_squared < 100).all(), "49 degrees of freedom; 100 is passed once in 40,000"
    correlations = np.corrcoef([*draws, np.roll(draws[0], 1)]) - np.eye(5)
    assert np.abs(correlations).max() < 4.5 / np.sqrt(n)
