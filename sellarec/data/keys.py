"""64-bit keys of ids, so that half a billion rows are joined by numbers instead of strings.

A key is a function of the id alone, on any machine: the hashes of data-frame libraries differ between their versions and
between processors. Two ids with one key are found when ids are numbered, and refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose values look drawn (the end of splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
        x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
        return x ^ (x >> np.uint64(31))


def uniform(rows: np.ndarray, *salt: int) -> np.ndarray:
    """float64 in [0, 1), a function of (row, salt) alone (splitmix64), whatever other rows there are."""
    state = np.random.SeedSequence(salt).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        x = (rows.astype(np.uint64) + np.uint64(1)) * _STEP + state
    return (mix(x) >> np.uint64(11)) / float(1 << 53)


def keys_of(ids: pa.Array) -> np.ndarray:
    """uint64 keys of int64 or string ids, without nulls."""
    if pa.types.is_integer(ids.type):
        with np.errstate(over="ignore"):
            return mix(ids.cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64) + _STEP)
    ids = ids.cast(pa.large_binary())
    if len(ids) == 0:
        return np.empty(0, np.uint64)
    _, offset_buffer, data_buffer = ids.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    lengths = np.diff(offsets)
    words = -(-int(lengths.max()) // 8)
    found = lengths.astype(np.uint64)
    data = np.concatenate([data, np.zeros(8, np.uint8)])
    place = np.arange(8)
    for word in range(words):
        # of an id that has ended, the word counts no more, so that a key doesn't depend on the ids beside it
        within = np.flatnonzero(lengths > 8 * word)
        start = offsets[within] + 8 * word
        piece = data[start[:, None] + place]
        piece[place >= (lengths[within] - 8 * word)[:, None]] = 0
        with np.errstate(over="ignore"):
            found[within] = mix((found[within] ^ piece.view("<u8")[:, 0]) + _STEP)
    return mix(found + _STEP)


def write_numbering(keys: np.ndarray, numbers: np.ndarray, path: Path) -> None:
    """Write key -> number for `look_up`, sorted by key, as PATH.keys.npy and PATH.numbers.npy."""
    order = np.argsort(keys)
    np.save(f"{path}.keys.npy", keys[order])
    np.save(f"{path}.numbers.npy", numbers[order])


def look_up(keys: np.ndarray, path: Path, unknown: int | None = None) -> np.ndarray:
    """The numbers, int64, of keys that `write_numbering` wrote; the files are mapped, so processes share their memory.

    Args:
        unknown: what stands for a key that was not written.

    Raises:
        KeyError: a key that was not written, and nothing stands for it.
    """
    known = np.load(f"{path}.keys.npy", mmap_mode="r")
    numbers = np.load(f"{path}.numbers.npy", mmap_mode="r")
    all_keys = pl.Series("key", keys)
    wanted = np.sort(all_keys.unique().to_numpy())  # sorted, so that the search runs through the file once
    found = np.full(len(wanted), -1 if unknown is None else unknown, np.int64)
    if len(known) and len(wanted):
        position = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        present = known[position] == wanted
        found[present] = numbers[position[present]]
    else:
        present = np.zeros(len(wanted), bool)
    if unknown is None and not present.all():
        raise KeyError(f"{path}: a key without a number")
    table = pl.DataFrame({"key": wanted, "number": found})
    return all_keys.to_frame().join(table, on="key", how="left", maintain_order="left")["number"].to_numpy()
