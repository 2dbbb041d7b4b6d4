"""How large the pages of a Parquet file are, by the header of each: its footer may say anything.

Headers are structs in Thrift's compact protocol (parquet.thrift, PageHeader; thrift-compact-protocol.md), of
which fields 2 and 3 are the sizes unpacked and packed. pyarrow offers no way to ask for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

_USUAL_HEADER = 2**12  # bytes
_LONGEST_HEADER = 2**20  # with statistics of long texts in it
_UNPACKED, _PACKED = 2, 3
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_DEEPEST = 8


def page_sizes(file: BinaryIO, column: Any) -> Iterator[int]:
    """The unpacked bytes of each page of `column` (pyarrow's ColumnChunkMetaData) of the open `file`.

    Raises ValueError where there are none such.
    """
    starts = [column.data_page_offset]
    if column.has_dictionary_page:
        starts.append(column.dictionary_page_offset)
    place = min((x for x in starts if x), default=0)  # 0 where there are no pages of that kind
    end = place + column.total_compressed_size
    while place < end:
        length, unpacked, packed = _page_at(file, place, end - place)
        yield unpacked
        place += length + packed


def _page_at(file: BinaryIO, place: int, room: int) -> tuple[int, int, int]:
    """(bytes of its header, unpacked, packed) of the page at `place`, which has `room` at most."""
    file.seek(place)
    header = _Header(file.read(min(_USUAL_HEADER, room)))
    try:
        sizes = header.sizes()
    except ValueError:
        if room <= _USUAL_HEADER:
            raise
        header = _Header(header.data + file.read(min(_LONGEST_HEADER, room) - _USUAL_HEADER))
        sizes = header.sizes()
    return header.place, *sizes


class _Header:
    """A reader of one header in `data`. place: bytes read so far."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def sizes(self) -> tuple[int, int]:
        found = self._struct(0)
        sizes = found.get(_UNPACKED, -1), found.get(_PACKED, -1)
        if min(sizes) < 0:
            raise ValueError("the header of a page has no sizes")
        return sizes

    def _struct(self, depth: int) -> dict[int, int]:
        """The whole numbers among its fields, by their ids; all else is skipped."""
        if depth > _DEEPEST:
            raise ValueError("the header of a page is too deep")
        found: dict[int, int] = {}
        number = 0
        while (first := self._byte()) != _STOP:
            kind = first & 15
            number = number + (first >> 4) if first >> 4 else self._whole()
            value = self._value(kind, depth)
            if value is not None:
                found[number] = value
        return found

    def _value(self, kind: int, depth: int) -> int | None:
        if kind in (_TRUE, _FALSE):
            return None
        if _BYTE < kind < _DOUBLE:
            return self._whole()
        if kind == _BYTE:
            self._skip(1)
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._plain())
        elif kind in (_LIST, _SET):
            self._list(depth)
        elif kind == _STRUCT:
            self._struct(depth + 1)
        else:  # maps stand in no header of a page
            raise ValueError("the header of a page cannot be read")
        return None

    def _list(self, depth: int) -> None:
        first = self._byte()
        count = first >> 4 if first >> 4 < 15 else self._plain()
        if count > len(self.data):
            raise ValueError("the header of a page cannot be read")
        for _ in range(count):
            if first & 15 in (_TRUE, _FALSE):
                self._skip(1)
            else:
                self._value(first & 15, depth + 1)

    def _byte(self) -> int:
        self._skip(1)
        return self.data[self.place - 1]

    def _skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self.data):
            raise ValueError("the header of a page is cut")

    def _plain(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("the header of a page cannot be read")

    def _whole(self) -> int:
        value = self._plain()
        return (value >> 1) ^ -(value & 1)
