"""How large the pages of a Parquet file are, by its footer and the header of each: a footer may say anything.

Both are structs in Thrift's compact protocol (parquet.thrift, FileMetaData and PageHeader;
thrift-compact-protocol.md). pyarrow offers no way to ask for headers, and where a footer is damaged its
FileMetaData ends the process (26.0, an exception that nothing catches).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

_USUAL_HEADER = 2**12  # bytes
_LONGEST_HEADER = 2**20  # with statistics of long texts in it
_LONGEST_FOOTER = 2**26
_MAGIC = b"PAR1"
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_DEEPEST = 12


@dataclass(frozen=True)
class Column:
    """A column of a row group. name: with dots; encodings: their numbers in parquet.thrift.

    values: how many; place: where its first page begins, in bytes; packed: bytes of its pages, as stored.
    """

    name: str
    encodings: frozenset[int]
    values: int
    place: int
    packed: int


def columns_of(file: BinaryIO) -> list[list[Column]]:
    """The columns of each row group, by the footer of the open `file`. Raises ValueError if it is none."""
    end = file.seek(0, 2) - 8
    file.seek(max(0, end))
    tail = file.read(8)
    size = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or not 0 < size <= min(end, _LONGEST_FOOTER):
        raise ValueError("it has no footer of Parquet")
    file.seek(end - size)
    try:
        groups = _Thrift(file.read(size)).struct(0)[4]
        return [[_column(chunk[3]) for chunk in group[1]] for group in groups]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("its footer is damaged") from error


def _column(found: dict[int, Any]) -> Column:
    """Of a ColumnMetaData."""
    # 0 stands for no pages of a kind.
    place = min((x for x in (found[9], found.get(11, 0)) if x), default=0)
    numbers = (found[5], place, found[7], *found[2])
    if not all(isinstance(x, int) and x >= 0 for x in numbers):
        raise TypeError
    name = b".".join(found[3]).decode("utf-8", "replace")
    return Column(name, frozenset(found[2]), found[5], place, found[7])


def page_sizes(file: BinaryIO, column: Column) -> Iterator[int]:
    """The unpacked bytes of each page of `column` of the open `file`; ValueError if there are none such."""
    place, end = column.place, column.place + column.packed
    while place < end:
        length, unpacked, packed = _page_at(file, place, end - place)
        yield unpacked
        place += length + packed


def _page_at(file: BinaryIO, place: int, room: int) -> tuple[int, int, int]:
    """(bytes of its header, unpacked, packed) of the page at `place`, which has `room` at most."""
    file.seek(place)
    data = file.read(min(_USUAL_HEADER, room))
    try:
        return _header(data)
    except ValueError:
        if room <= _USUAL_HEADER:
            raise
        return _header(data + file.read(min(_LONGEST_HEADER, room) - _USUAL_HEADER))


def _header(data: bytes) -> tuple[int, int, int]:
    """(bytes read, unpacked, packed) of the PageHeader at the beginning of `data`."""
    reader = _Thrift(data)
    found = reader.struct(0)
    unpacked, packed = found.get(2), found.get(3)
    if not (isinstance(unpacked, int) and isinstance(packed, int) and unpacked >= 0 and packed >= 0):
        raise ValueError("the header of a page has no sizes")
    return reader.place, unpacked, packed


class _Thrift:
    """A reader of one struct in `data`. place: bytes read so far."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def struct(self, depth: int) -> dict[int, Any]:
        """Its fields by their ids: whole numbers, truth values, bytes, lists and structs; no fractions."""
        if depth > _DEEPEST:
            raise ValueError("a header or footer is too deep")
        found: dict[int, Any] = {}
        number = 0
        while (first := self._byte()) != _STOP:
            kind = first & 15
            number = number + (first >> 4) if first >> 4 else self._whole()
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if _BYTE < kind < _DOUBLE:
            return self._whole()
        if kind == _BINARY:
            size = self._plain()
            self._skip(size)
            return self.data[self.place - size : self.place]
        if kind in (_LIST, _SET):
            return self._list(depth)
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind not in (_BYTE, _DOUBLE):  # maps stand in no header
            raise ValueError("a header or footer cannot be read")
        self._skip(1 if kind == _BYTE else 8)
        return None

    def _list(self, depth: int) -> list[Any]:
        first = self._byte()
        kind, count = first & 15, first >> 4 if first >> 4 < 15 else self._plain()
        if count > len(self.data):
            raise ValueError("a header or footer cannot be read")
        is_flags = kind in (_TRUE, _FALSE)
        return [self._byte() == _TRUE if is_flags else self._value(kind, depth + 1) for _ in range(count)]

    def _byte(self) -> int:
        self._skip(1)
        return self.data[self.place - 1]

    def _skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self.data):
            raise ValueError("a header or footer is cut")

    def _plain(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a header or footer cannot be read")

    def _whole(self) -> int:
        value = self._plain()
        return (value >> 1) ^ -(value & 1)
