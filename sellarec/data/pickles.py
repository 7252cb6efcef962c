"""Read a pandas-pickled DataFrame without executing it.

A pickle is a program: Python's own unpickler calls whatever the file names. This reader is a small interpreter of the
opcodes that a pickled DataFrame consists of, and it calls nothing. A global is only ever a name; `REDUCE` and `BUILD`
look that name up in a fixed table of this module's functions, each of which checks its arguments and makes plain numpy
data. Everything else (another global, another opcode, an extension code, a persistent id) is refused before it has any
effect.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from sellarec.errors import UserError

MAX_VALUES_PER_BYTE = 64
"""Bound on a table's values and characters per byte of its pickle. Rows may share lists and texts, so it is above 1."""

_NUMERIC_DTYPES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
_OBJECT_DTYPES = frozenset({"O", "O4", "O8"})
_TEXT_DTYPE = re.compile(r"U[1-9][0-9]{0,5}")
_SCALARS = frozenset({int, float, str, bool, type(None)})
_MAX_DIMENSIONS = 2


class _Malformed(Exception):
    """The bytes are not a pickled DataFrame of the known layout; the message says where they depart from it."""


class _Refused(Exception):
    """The bytes ask for something other than plain data; the message names it."""


@dataclass(frozen=True)
class _Global:
    """A name that the file mentions. It is compared and never resolved."""

    name: str


@dataclass
class _Dtype:
    code: str
    byte_order: str = "<"

    @property
    def is_object(self) -> bool:
        return self.code in _OBJECT_DTYPES

    def numpy(self) -> np.dtype:
        return np.dtype(self.byte_order + self.code)


@dataclass
class _Array:
    """A numpy array under construction: empty until BUILD has given it its state."""

    values: np.ndarray | None = None
    items: list | None = None  # of an object array, in `order`
    shape: tuple[int, ...] = (0,)
    order: str = "C"

    def rows(self) -> list[Any]:
        """The array along its first axis: numpy rows, or lists of objects, for one or two dimensions."""
        if self.values is not None:
            return list(self.values)
        if self.items is None:
            raise _Malformed("an array without its values")
        if len(self.shape) == 1:
            return self.items
        count, width = self.shape
        if self.order == "F":
            return [self.items[index::count] for index in range(count)]
        return [self.items[index * width : (index + 1) * width] for index in range(count)]


@dataclass(frozen=True)
class _Block:
    values: _Array
    placement: slice | _Array
    dimensions: int


@dataclass(frozen=True)
class _Blocks:
    blocks: tuple
    axes: list


@dataclass(frozen=True)
class _Index:
    values: list[Any] | None  # None for a range
    length: int


@dataclass
class _Frame:
    state: dict | None = None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _Malformed(message)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS or not all(_is_count(size) for size in value):
        raise _Malformed(f"an array of shape {value!r}")
    return value


def _make_dtype(arguments: tuple) -> _Dtype:
    _require(len(arguments) in (1, 3) and isinstance(arguments[0], str), "a dtype without a name")
    code = arguments[0]
    if code not in _NUMERIC_DTYPES and code not in _OBJECT_DTYPES and not _TEXT_DTYPE.fullmatch(code):
        raise _Refused(f"the numpy dtype {code!r}")
    return _Dtype(code)


def _from_buffer(buffer: bytes | bytearray, kind: np.dtype) -> np.ndarray:
    if kind.kind == "U":
        # numpy keeps text as code points and does not check them before Python fails on them.
        code_points = np.frombuffer(buffer, np.dtype("u4").newbyteorder(kind.byteorder))
        _require(code_points.max(initial=0) <= sys.maxunicode, "text that is no Unicode")
    return np.frombuffer(buffer, kind)


def _fixed_array(buffer: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    _require(isinstance(dtype, _Dtype), "an array without a dtype")
    _require(isinstance(buffer, bytes | bytearray), "an array without a buffer")
    if dtype.is_object:
        raise _Refused("an array of object addresses")
    shape = _shape(shape)
    wanted = int(np.prod(shape, dtype=object)) * dtype.numpy().itemsize
    _require(len(buffer) == wanted, f"an array of {len(buffer)} bytes where its shape {shape} needs {wanted}")
    _require(order in ("C", "F"), f"an array in order {order!r}")
    values = _from_buffer(buffer, dtype.numpy()).reshape(shape, order=order)
    return _Array(values.astype(values.dtype.newbyteorder("="), copy=False), shape=shape)


def _make_frombuffer(arguments: tuple) -> _Array:
    _require(len(arguments) == 4, "_frombuffer with other than four arguments")
    return _fixed_array(*arguments)


def _make_array(arguments: tuple) -> _Array:
    _require(len(arguments) == 3 and isinstance(arguments[0], _Global), "_reconstruct with unknown arguments")
    _require(arguments[0].name == "numpy.ndarray", f"_reconstruct of {arguments[0].name}")
    return _Array()


def _make_scalar(arguments: tuple) -> int | float | bool | str:
    _require(len(arguments) == 2 and isinstance(arguments[0], _Dtype), "a numpy scalar with unknown arguments")
    dtype, buffer = arguments
    if dtype.is_object:
        raise _Refused("a numpy scalar of an object")
    kind = dtype.numpy()
    _require(isinstance(buffer, bytes) and len(buffer) == kind.itemsize, "a numpy scalar of the wrong size")
    return _from_buffer(buffer, kind)[0].item()


def _make_bytes(arguments: tuple) -> bytes:
    # Protocols 0 to 2 have no opcode for bytes: they write _codecs.encode(text, "latin1").
    _require(len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1", "encoded bytes")
    try:
        return arguments[0].encode("latin1")
    except UnicodeEncodeError as error:
        raise _Malformed("encoded bytes outside latin1") from error


def _make_slice(arguments: tuple) -> slice:
    _require(len(arguments) == 3 and all(_is_count(value) for value in arguments), "a slice of other than three counts")
    _require(arguments[2] > 0, "a slice with step 0")
    return slice(*arguments)


def _make_block(arguments: tuple) -> _Block:
    _require(len(arguments) == 3, "a block with other than three arguments")
    values, placement, dimensions = arguments
    _require(isinstance(values, _Array), "a block without an array")
    _require(isinstance(placement, slice | _Array), "a block without a placement")
    _require(dimensions == 2, f"a block of {dimensions!r} dimensions")
    return _Block(values, placement, dimensions)


def _make_blocks(arguments: tuple) -> _Blocks:
    _require(len(arguments) == 2, "a block manager with other than two arguments")
    blocks, axes = arguments
    _require(
        isinstance(blocks, tuple) and all(isinstance(block, _Block) for block in blocks), "a block manager's blocks"
    )
    _require(isinstance(axes, list) and len(axes) == 2, "a block manager without two axes")
    _require(all(isinstance(axis, _Index) for axis in axes), "a block manager's axes")
    return _Blocks(blocks, axes)


def _make_index(arguments: tuple) -> _Index:
    _require(len(arguments) == 2 and isinstance(arguments[0], _Global), "an index with unknown arguments")
    kind, state = arguments
    _require(isinstance(state, dict), "an index without a state")
    if kind.name in _RANGE_NAMES:
        bounds = [state.get(key) for key in ("start", "stop", "step")]
        _require(all(type(bound) is int for bound in bounds) and bounds[2] != 0, "a range index without bounds")
        return _Index(None, len(range(*bounds)))
    _require(kind.name in _INDEX_NAMES, f"an index of type {kind.name}")
    data = state.get("data")
    _require(isinstance(data, _Array) and len(data.shape) == 1, "an index without its values")
    return _Index(data.rows(), data.shape[0])


_INDEX_NAMES = frozenset({"pandas.core.indexes.base.Index", "pandas.Index"})
_RANGE_NAMES = frozenset({"pandas.core.indexes.range.RangeIndex", "pandas.RangeIndex"})
_FRAME_NAMES = frozenset({"pandas.core.frame.DataFrame", "pandas.DataFrame"})

_REDUCERS: dict[str, Callable[[tuple], Any]] = {
    "numpy.core.multiarray._reconstruct": _make_array,
    "numpy._core.multiarray._reconstruct": _make_array,
    "numpy.core.numeric._frombuffer": _make_frombuffer,
    "numpy._core.numeric._frombuffer": _make_frombuffer,
    "numpy.core.multiarray.scalar": _make_scalar,
    "numpy._core.multiarray.scalar": _make_scalar,
    "numpy.dtype": _make_dtype,
    "builtins.slice": _make_slice,
    "__builtin__.slice": _make_slice,
    "_codecs.encode": _make_bytes,
    "pandas._libs.internals._unpickle_block": _make_block,
    "pandas.core.internals.managers.BlockManager": _make_blocks,
    "pandas.core.indexes.base._new_Index": _make_index,
}
_KNOWN_NAMES = frozenset(_REDUCERS) | _INDEX_NAMES | _RANGE_NAMES | _FRAME_NAMES | {"numpy.ndarray"}


def _global(module: object, name: object) -> _Global:
    _require(isinstance(module, str) and isinstance(name, str), "a global without a name")
    full_name = f"{module}.{name}"
    if full_name not in _KNOWN_NAMES:
        raise _Refused(full_name)
    return _Global(full_name)


def _reduce(function: Any, arguments: Any) -> Any:
    _require(isinstance(function, _Global) and isinstance(arguments, tuple), "a call of something that is no global")
    if function.name not in _REDUCERS:
        raise _Refused(f"a call of {function.name}")
    return _REDUCERS[function.name](arguments)


def _new_object(kind: Any, arguments: Any) -> _Frame:
    _require(isinstance(kind, _Global) and arguments == (), "a new object of an unknown kind")
    if kind.name not in _FRAME_NAMES:
        raise _Refused(f"a new object of {kind.name}")
    return _Frame()


def _build(target: Any, state: Any) -> None:
    if isinstance(target, _Frame):
        _require(isinstance(state, dict), "a data frame without a state")
        target.state = state
    elif isinstance(target, _Dtype):
        _require(isinstance(state, tuple) and len(state) >= 8, "a dtype without its state")
        # state: version, byte order, sub-array, names, fields, item size, alignment, flags
        _require(state[1] in ("<", ">", "=", "|") and state[2:5] == (None, None, None), "a dtype with a structure")
        target.byte_order = state[1]
    elif isinstance(target, _Array):
        _require(target.values is None and target.items is None, "an array built twice")
        _require(isinstance(state, tuple) and len(state) == 5, "an array without its state")
        _, shape, dtype, is_fortran, data = state
        order = "F" if is_fortran else "C"
        _require(isinstance(dtype, _Dtype), "an array without a dtype")
        if dtype.is_object:
            shape = _shape(shape)
            _require(isinstance(data, list), "an object array without a list of values")
            wanted = int(np.prod(shape, dtype=object))
            _require(
                len(data) == wanted, f"an object array of {len(data)} values where its shape {shape} needs {wanted}"
            )
            target.items = data
        else:
            target.values = _fixed_array(data, dtype, shape, order).values
        target.shape, target.order = _shape(shape), order
    else:
        raise _Refused(f"a state for {type(target).__name__.strip('_')}")


_MARK = object()


def _interpret(data: bytes) -> Any:
    """Run the pickle `data` on this module's own stand-ins and return what it leaves on the stack."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    marks: list[int] = []
    position = 0
    end = len(data)
    push = stack.append

    def take(count: int) -> bytes:
        nonlocal position
        if count < 0 or position + count > end:
            raise IndexError
        chunk = data[position : position + count]
        position += count
        return chunk

    def take_line() -> str:
        nonlocal position
        newline = data.index(b"\n", position)
        line = data[position:newline].decode("utf-8")
        position = newline + 1
        return line

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    # The commonest opcodes of a history column come first: a file holds millions of them.
    while True:
        opcode = data[position]
        position += 1
        if opcode == 0x6A:  # LONG_BINGET
            push(memo[data[position] | data[position + 1] << 8 | data[position + 2] << 16 | data[position + 3] << 24])
            position += 4
        elif opcode == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif opcode == 0x4B:  # BININT1
            push(data[position])
            position += 1
        elif opcode == 0x68:  # BINGET
            push(memo[data[position]])
            position += 1
        elif opcode == 0x4E:  # NONE
            push(None)
        elif opcode == 0x28:  # MARK
            marks.append(len(stack))
        elif opcode == 0x52:  # REDUCE
            arguments = stack.pop()
            stack[-1] = _reduce(stack[-1], arguments)
        elif opcode == 0x5D:  # EMPTY_LIST
            push([])
        elif opcode == 0x65:  # APPENDS
            values = since_mark()
            _require(isinstance(stack[-1], list), "an append to something that is no list")
            stack[-1].extend(values)
        elif opcode == 0x61:  # APPEND
            value = stack.pop()
            _require(isinstance(stack[-1], list), "an append to something that is no list")
            stack[-1].append(value)
        elif opcode == 0x86:  # TUPLE2
            stack[-2:] = [tuple(stack[-2:])]
        elif opcode == 0x43:  # SHORT_BINBYTES
            push(take(take(1)[0]))
        elif opcode == 0x8C:  # SHORT_BINUNICODE
            push(take(take(1)[0]).decode("utf-8", "surrogatepass"))
        elif opcode == 0x87:  # TUPLE3
            stack[-3:] = [tuple(stack[-3:])]
        elif opcode == 0x74:  # TUPLE
            values = since_mark()
            push(tuple(values))
        elif opcode == 0x62:  # BUILD
            state = stack.pop()
            _build(stack[-1], state)
        elif opcode == 0x89:  # NEWFALSE
            push(False)
        elif opcode == 0x88:  # NEWTRUE
            push(True)
        elif opcode == 0x4D:  # BININT2
            push(data[position] | data[position + 1] << 8)
            position += 2
        elif opcode == 0x4A:  # BININT
            push(struct.unpack("<i", take(4))[0])
        elif opcode == 0x42:  # BINBYTES
            push(take(struct.unpack("<I", take(4))[0]))
        elif opcode == 0x58:  # BINUNICODE
            push(take(struct.unpack("<I", take(4))[0]).decode("utf-8", "surrogatepass"))
        elif opcode == 0x8D:  # BINUNICODE8
            push(take(struct.unpack("<Q", take(8))[0]).decode("utf-8", "surrogatepass"))
        elif opcode in (0x8E, 0x96):  # BINBYTES8, BYTEARRAY8
            push(take(struct.unpack("<Q", take(8))[0]))
        elif opcode == 0x47:  # BINFLOAT
            push(struct.unpack(">d", take(8))[0])
        elif opcode == 0x8A:  # LONG1
            push(int.from_bytes(take(take(1)[0]), "little", signed=True))
        elif opcode == 0x85:  # TUPLE1
            stack[-1] = (stack[-1],)
        elif opcode == 0x29:  # EMPTY_TUPLE
            push(())
        elif opcode == 0x7D:  # EMPTY_DICT
            push({})
        elif opcode in (0x73, 0x75):  # SETITEM, SETITEMS
            values = since_mark() if opcode == 0x75 else [stack.pop() for _ in range(2)][::-1]
            target = stack[-1]
            _require(isinstance(target, dict) and len(values) % 2 == 0, "an item set in something that is no dict")
            _require(all(type(key) is str for key in values[::2]), "a dict with a key that is no text")
            target.update(zip(values[::2], values[1::2], strict=True))
        elif opcode == 0x71:  # BINPUT
            memo[take(1)[0]] = stack[-1]
        elif opcode == 0x72:  # LONG_BINPUT
            memo[struct.unpack("<I", take(4))[0]] = stack[-1]
        elif opcode == 0x63:  # GLOBAL
            module = take_line()
            push(_global(module, take_line()))
        elif opcode == 0x93:  # STACK_GLOBAL
            name = stack.pop()
            stack[-1] = _global(stack[-1], name)
        elif opcode == 0x81:  # NEWOBJ
            arguments = stack.pop()
            stack[-1] = _new_object(stack[-1], arguments)
        elif opcode == 0x95:  # FRAME: only a hint for buffered reading
            take(8)
        elif opcode == 0x80:  # PROTO
            version = take(1)[0]
            _require(2 <= version <= 5, f"pickle protocol {version}")
        elif opcode == 0x2E:  # STOP
            _require(len(stack) == 1 and position == end, "data after its end")
            return stack[0]
        elif opcode == 0x69:  # INST names a global as GLOBAL does
            module = take_line()
            raise _Refused(f"{module}.{take_line()}")
        elif opcode in (0x82, 0x83, 0x84):
            raise _Refused("an extension code (opcode EXT)")
        else:
            raise _Refused(f"the opcode 0x{opcode:02x}")


def _cell(value: Any) -> tuple[Any, int]:
    """One cell of an object column as plain Python (a number, text, None, or a flat list of those), and its size.

    The size is what the cell takes when it is copied out: values, and characters of text.
    """
    if isinstance(value, _Array):
        _require(len(value.shape) == 1, "a cell that holds an array of several dimensions")
        value = value.values.tolist() if value.values is not None else value.rows()
    if type(value) is list:
        types = set(map(type, value))
        _require(types <= _SCALARS, "a cell with a list that is not flat")
        if str not in types:
            return value, 1 + len(value)
        return value, 1 + sum(1 + len(entry) for entry in value if type(entry) is str)
    _require(type(value) in _SCALARS, f"a cell that holds {type(value).__name__.strip('_')}")
    return value, 1 + (len(value) if type(value) is str else 0)


def _table(frame: Any, budget: int) -> pa.Table:
    """The frame's columns as Arrow arrays, at most `budget` values in all."""
    _require(isinstance(frame, _Frame) and frame.state is not None, "no data frame")
    manager = frame.state.get("_mgr")
    _require(isinstance(manager, _Blocks), "a data frame without its blocks")
    names, row_count = manager.axes[0].values, manager.axes[1].length
    _require(names is not None and all(type(name) is str for name in names), "columns that are not named by text")
    _require(len(set(names)) == len(names), f"two columns of one name among {', '.join(names)}")
    columns: dict[str, pa.Array] = {}
    for block in manager.blocks:
        _require(len(block.values.shape) == 2, "a block that is not two-dimensional")
        _require(block.values.shape[1] == row_count, f"a block of other than {row_count} rows")
        if isinstance(block.placement, slice):
            placement = list(range(len(names))[block.placement])
        else:
            _require(block.placement.values is not None, "a block without a placement")
            placement = block.placement.values.tolist()
        _require(len(placement) == block.values.shape[0], "a block whose placement does not fit it")
        for column, values in zip(placement, block.values.rows(), strict=True):
            _require(type(column) is int and 0 <= column < len(names), f"a block placed at column {column!r}")
            _require(names[column] not in columns, f"two blocks for the column {names[column]}")
            if isinstance(values, np.ndarray):
                columns[names[column]] = pa.array(values, from_pandas=True)
            else:
                cells = []
                for value in values:
                    cell, size = _cell(value)
                    budget -= size
                    _require(budget >= 0, "values repeated beyond what a file of this size holds")
                    cells.append(cell)
                try:
                    columns[names[column]] = pa.array(cells, from_pandas=True)
                except (ValueError, TypeError, OverflowError) as error:
                    raise _Malformed(f"a column {names[column]} of mixed types ({error})") from error
    _require(len(columns) == len(names), "a column without values")
    return pa.table({name: columns[name] for name in names})


def read_pickled_frame(data: bytes, name: str) -> pa.Table:
    """Return the DataFrame that the pickle `data` holds, without executing it; its row index is dropped.

    Columns may be of booleans, integers, floats, text, or flat lists of these. `name` is the file's name, for messages.

    Raises:
        UserError: the pickle names anything else than a DataFrame's parts, is truncated, or is laid out otherwise.
    """

    def refuse(what: str) -> NoReturn:
        raise UserError(f"{name} holds {what}, which is not plain data; refused without executing it.")

    try:
        return _table(_interpret(data), MAX_VALUES_PER_BYTE * len(data))
    except _Refused as error:
        refuse(str(error))
    except _Malformed as error:
        raise UserError(
            f"{name} is not a pickled pandas DataFrame of plain columns: it holds {error}. "
            "Check the download, or give the same table as Parquet."
        ) from error
    except (IndexError, KeyError, ValueError, OverflowError, RecursionError, struct.error) as error:
        # Running off the end of the data, of the stack or of the memo: the opcodes before it were all allowed.
        raise UserError(
            f"{name} is truncated or is no pickle ({len(data):,} bytes read). Download it again, or give Parquet."
        ) from error
