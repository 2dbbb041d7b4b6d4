"""A few bytes that stand for gigabytes are refused by what reading them would take."""

from __future__ import annotations

import gzip
import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qprobe.data.reading import read_conversations
from qprobe.data.sources import parquet, table
from qprobe.errors import RunError, SampleError
from qprobe.runs import access, shown, units
from qprobe.runs.folder import RunFolder
from qprobe.runs.shown import ShownSample, write_shown
from qprobe.runs.units import DamagedUnitError, decode_unit, encode_unit
from qprobe.system.headers.parquet import columns_of, page_sizes
from tests.runs.runs import make_run, rows

UNIT = Path("kl-00000.parquet")


def unit(count: int, text: str = "standard", **how: Any) -> bytes:
    frame = rows("kl", *((f"s{i}", text, 3, 0.5, 2) for i in range(count)))
    file = io.BytesIO()
    pq.write_table(encode_unit("kl", frame)[1], file, **how)
    return file.getvalue()


def test_a_unit_that_claims_too_many_rows_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(units, "UNIT_CELLS", 40)
    assert decode_unit(UNIT, unit(8)).num_rows == 8
    with pytest.raises(DamagedUnitError, match="claims 9 rows of 5 columns"):
        decode_unit(UNIT, unit(9))


def test_a_long_text_that_many_rows_share_is_refused_before_it_is_copied():
    table = encode_unit("kl", rows("kl", *((f"s{i}", "a", 3, 0.5, 2) for i in range(3000))))[1]
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), ["x" * 2**20])
    file = io.BytesIO()  # 3 GB of text
    pq.write_table(table.set_column(1, "candidate", shared), file, store_schema=False)
    assert table.column_names[1] == "candidate" and len(file.getvalue()) < 2**20
    with pytest.raises(DamagedUnitError, match="its texts would take 3,145,"):
        decode_unit(UNIT, file.getvalue())


def test_encodings_that_are_not_ours_are_refused():
    data = unit(3, use_dictionary=False, column_encoding={"sample": "DELTA_BYTE_ARRAY"})
    with pytest.raises(DamagedUnitError, match="sample is stored otherwise"):
        decode_unit(UNIT, data)


def footer_says_little(data: bytes) -> bytes:
    """`data`, a Parquet file whose footer says of each large size that it is 50 bytes, in as many bytes."""
    found = pq.ParquetFile(io.BytesIO(data)).metadata
    group = found.row_group(0)
    sizes = {group.column(i).total_uncompressed_size for i in range(group.num_columns)}
    place = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[place:]
    for size in {group.total_byte_size, *sizes}:
        number, said = 2 * size, []
        while number >= 128:
            said.append(number & 127 | 128)
            number >>= 7
        said.append(number)
        if size > 10**6:
            footer = footer.replace(bytes(said), bytes([0x80 | 100, *[0x80] * (len(said) - 2), 0]))
    return data[:place] + footer


def test_a_footer_that_says_less_than_its_pages_hold_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    frame = pd.DataFrame({"prompt": ["x" * 2**22], "answer": ["a"]})
    frame.to_parquet(tmp_path / "a.parquet", compression="zstd")
    data = footer_says_little((tmp_path / "a.parquet").read_bytes())
    assert len(data) < 2**16 and pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).total_byte_size < 200
    (tmp_path / "a.parquet").write_bytes(data)
    assert len(read_conversations(tmp_path / "a.parquet").good) == 1
    monkeypatch.setattr(parquet, "_PAGE_BYTES", 2**22 - 1)
    with pytest.raises(SampleError, match=r"a page has 4,194,\d+ bytes, more than can be read"):
        read_conversations(tmp_path / "a.parquet")
    monkeypatch.setattr(units, "UNIT_BYTES", 2**21)
    bomb = footer_says_little(unit(1, "x" * 2**22, compression="zstd"))
    with pytest.raises(DamagedUnitError, match=r"candidate would take 4,19\d,\d+ bytes"):
        decode_unit(UNIT, bomb)


@pytest.mark.parametrize("how", [{"version": "1.0"}, {"data_page_version": "2.0"}, {"use_dictionary": False}])
def test_the_pages_of_a_file_are_as_large_as_its_honest_footer_says(how: dict[str, Any]):
    data = unit(3000, "a text", data_page_size=500, **how)
    found = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    (columns,) = columns_of(io.BytesIO(data))
    for one, column in zip(columns, map(found.column, range(found.num_columns)), strict=True):
        assert (one.name, one.values) == (column.path_in_schema, column.num_values)
        assert one.packed == column.total_compressed_size and len(one.encodings) == len(set(column.encodings))
        sizes = list(page_sizes(io.BytesIO(data), one))
        headers = column.total_uncompressed_size - sum(sizes)  # which the footer counts too
        assert 10 * len(sizes) < headers < 200 * len(sizes)
    with pytest.raises(ValueError, match="header or footer"):
        list(page_sizes(io.BytesIO(b"\xff" * len(data)), columns[0]))


@pytest.mark.slow
def test_a_footer_damaged_anywhere_is_an_error_and_never_the_end_of_the_process():
    # pyarrow ends the process where the histograms of sizes in a footer are not as long as they must be.
    data = unit(30, "a text")
    end = len(data) - 8
    for place in range(end - int.from_bytes(data[end : end + 4], "little"), len(data)):
        for byte in (0, 0xFF, data[place] ^ 1):
            with suppress(DamagedUnitError, RunError):
                decode_unit(UNIT, data[:place] + bytes([byte]) + data[place + 1 :])


def test_rows_that_share_a_long_text_are_read_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    frame = pd.DataFrame({"prompt": ["x" * 2**12] * 100, "answer": [f"{i}" for i in range(100)]})
    frame.to_parquet(tmp_path / "a.parquet", compression=None)
    monkeypatch.setattr(parquet, "_AT_ONCE_BYTES", 2**15)
    with open(tmp_path / "a.parquet", "rb") as file:
        assert parquet._rows_at_once(file) in range(2, 9)
    assert len(read_conversations(tmp_path / "a.parquet").good) == 100
    monkeypatch.setattr(parquet, "_GROUP_VALUES", 99)
    with pytest.raises(SampleError, match="100 values of one column, more than can be read; write it with"):
        read_conversations(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["scan.json", "samples.json", "files.json", "notes/end.json"])
def test_a_file_that_parsing_would_blow_up_is_refused_by_its_size(tmp_path: Path, name: str):
    run = make_run(tmp_path / "run")
    with open(run / name, "wb") as file:
        file.truncate(access.MOST_BYTES + 1)
    found = RunFolder(run)
    reads = {
        "scan.json": lambda: found.key,
        "samples.json": lambda: found.samples,
        "files.json": lambda: found.files.read("layers.csv"),
        "notes/end.json": lambda: found.notes.get("end"),
    }
    (run / "layers.csv").write_bytes(b"")
    with pytest.raises(RunError, match=r"cannot be read \(it is larger than 48 MiB\)"):
        reads[name]()


def test_very_many_samples_are_not_all_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunFolder(make_run(tmp_path / "run"))
    monkeypatch.setattr(shown, "MOST_BYTES", 2000)
    write_shown(run, [ShownSample(str(i), "p", None, None, None, (), None) for i in range(100)])
    assert list(run.samples) == [str(i) for i in range(len(run.samples))] and 5 < len(run.samples) < 30


def test_a_line_of_a_table_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"prompt,answer\na,b\n" + b"x" * 10**6))
    monkeypatch.setattr(table, "LONGEST_LINE", 1000)
    with pytest.raises(SampleError, match=r"no complete table \(behind row 1: a line is longer than"):
        read_conversations(path)


def test_headers_of_small_pages_are_read_without_what_follows_them():
    class Counted(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.taken += len(data)
            return data

    written = io.BytesIO()  # 20 pages of 50 kB
    pages = pa.table({"x": [f"{i:050000}" for i in range(20)]})
    pq.write_table(
        pages, written, use_dictionary=False, compression="none", data_page_size=1, write_batch_size=1
    )
    file = Counted(written.getvalue())
    ((column,),) = columns_of(io.BytesIO(written.getvalue()))
    found = list(page_sizes(file, column))
    assert sum(found) > 20 * 50_000 and len(found) == 20
    # The first header holds the longest and shortest text of all, so it alone is longer than usual.
    assert file.taken < 300_000
