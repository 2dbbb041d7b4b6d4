"""Each kind of source gives the same rows; what cannot be read is one sentence."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from qprobe.data.images import decode, file_bytes
from qprobe.data.reading import Reading, check_left_out, read_conversations
from qprobe.errors import MachineError, QprobeError, SampleError
from tests import tiny

ROWS = [{"image": "a.png", "prompt": "What?", "answer": str(n)} for n in range(3)]
BYTES = [{**x, "image": {"bytes": tiny.picture(0), "path": None}} for x in ROWS]


def lines(path: Path) -> Path:
    path.write_text("".join(json.dumps(x) + "\n" for x in ROWS))
    return path


def array(path: Path) -> Path:
    path.write_text("\ufeff \n" + json.dumps(ROWS, indent=1) + "\n", "utf-8")
    return path


def parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(BYTES), path)
    return path


def parquet_folder(path: Path) -> Path:
    path.mkdir()
    for n, row in enumerate(BYTES):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([row]), path / f"train-{n:05d}-of-00003.parquet"
        )
    return path


def packed(path: Path) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(x) + "\n" for x in ROWS).encode()))
    return path


def packed_array(path: Path) -> Path:
    path.write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode()))
    return path


def wrapped(path: Path) -> Path:
    path.write_text(json.dumps({"version": 1.0, "data": ROWS, "info": {}}))
    return path


def one_split(path: Path) -> Path:
    path.write_text(json.dumps({"train": ROWS}, indent=2))
    return path


def pretty(path: Path) -> Path:
    path.write_text("\n".join(json.dumps(x, indent=4) for x in ROWS))
    return path


def table(path: Path) -> Path:
    delimiter = "\t" if path.suffix == ".tsv" else ";"
    rows = [["prompt", "answer", "image"], *([x["prompt"], x["answer"], x["image"]] for x in ROWS)]
    text = "".join(delimiter.join(f'"{x}"' for x in row) + "\r\n" for row in rows)
    path.write_text(text, "utf-16" if path.suffix == ".tsv" else "utf-8-sig", newline="")
    return path


def shards_in_data(path: Path) -> Path:
    path.mkdir()
    parquet_folder(path / "data")
    (path / "README.md").write_text("A data set.")
    return path


def images_with_metadata(path: Path) -> Path:
    path.mkdir()
    (path / "x.png").write_bytes(tiny.picture(0))
    rows = [{"file_name": "x.png", "prompt": x["prompt"], "answer": x["answer"]} for x in ROWS]
    (path / "metadata.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    return path


def images_with_a_table(path: Path) -> Path:
    (path / "train" / "photos").mkdir(parents=True)
    (path / "train" / "photos" / "x.png").write_bytes(tiny.picture(0))
    lines = [f"photos/x.png,{x['prompt']},{x['answer']}\n" for x in ROWS]
    (path / "train" / "metadata.csv").write_text("file_name,prompt,answer\n" + "".join(lines))
    return path


def lines_of_a_split(path: Path) -> Path:
    path.mkdir()
    (path / "a.png").write_bytes(tiny.picture(0))
    lines(path / "train.jsonl")
    return path


def saved(path: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(BYTES).cast_column("image", datasets.Image()).save_to_disk(path)
    return path


FILES: dict[str, Callable[[Path], Path]] = {
    "rows.jsonl": lines,
    "rows.json": array,
    "array.jsonl": array,
    "array": array,
    "lines.json": lines,
    "rows": lines,
    "rows.parquet": parquet,
    "parquet": parquet_folder,
    "saved": saved,
    "rows.jsonl.gz": packed,
    "rows.json.gz": packed_array,
    "data.json": wrapped,
    "train.json": one_split,
    "pretty.json": pretty,
    "rows.csv": table,
    "rows.tsv": table,
    "clone": shards_in_data,
    "metadata": images_with_metadata,
    "metadata of a split": images_with_a_table,
    "lines of a split": lines_of_a_split,
}


def answers(data: Any, how: Reading = Reading()) -> list[str]:  # noqa: B008
    found = read_conversations(data, how)
    assert found.skipped == () and found.notes == ()
    for one in found.good:
        (image,) = one.seen
        assert (image if isinstance(image, bytes) else file_bytes(image)) == tiny.picture(0)
    return [x.turns[-1].text for x in found.good]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(tiny.picture(0))
    path = FILES[name](tmp_path / name)
    assert answers(path) == answers(str(path)) == ["0", "1", "2"]


def test_a_saved_dataset_is_read_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = saved(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert answers(path) == ["0", "1", "2"]


def test_datasets_in_memory_give_the_bytes_of_their_images(tmp_path: Path):
    import datasets

    data = datasets.Dataset.from_list(BYTES).cast_column("image", datasets.Image())
    assert answers(data) == ["0", "1", "2"]
    assert answers(data.select([2, 0])) == ["2", "0"]
    splits = datasets.DatasetDict({"train": data, "test": data.select([1])})
    assert answers(splits, Reading(split="test")) == ["1"]
    splits.save_to_disk(tmp_path / "splits")
    assert answers(tmp_path / "splits", Reading(split="test")) == ["1"]
    for where in (splits, tmp_path / "splits"):
        with pytest.raises(SampleError, match=r"has the splits train, test\. Pass one of them to --split"):
            read_conversations(where)
        with pytest.raises(SampleError, match="no split 'dev'"):
            read_conversations(where, Reading(split="dev"))


def test_classes_have_their_names_in_every_source(tmp_path: Path):
    import datasets

    features = datasets.Features(
        prompt=datasets.Value("string"), answer=datasets.ClassLabel(names=["a", "b"])
    )
    data = datasets.Dataset.from_list([{"prompt": "which?", "answer": x} for x in (1, 0, None)], features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "rows.parquet")
    for where in (data, tmp_path / "saved", tmp_path / "rows.parquet"):
        assert [[t.text for t in x.turns] for x in read_conversations(where).good] == [
            ["which?", "b"], ["which?", "a"], ["which?"]
        ]  # fmt: skip


def test_a_dataframe_is_its_rows_and_what_is_missing_is_none():
    rows = [{"prompt": "How many?", "answer": 7.0}, {"prompt": "And here?"}]
    found = read_conversations(pandas.DataFrame(rows))
    assert found.skipped == () and [[t.text for t in x.turns] for x in found.good] == [
        ["How many?", "7.0"], ["And here?"]
    ]  # fmt: skip


def test_numbers_and_arrays_of_numpy_are_answers():
    values = (numpy.int64(7), numpy.float32(0.5), numpy.array(["a", "b", "b"]))
    found = read_conversations([{"prompt": "what?", "answer": x} for x in values])
    assert [x.turns[-1].text for x in found.good] == ["7", "0.5", "b"]


@pytest.mark.parametrize("data", [ROWS[0], {"prompt": ["a"], "answer": ["b"]}])
def test_a_row_by_itself_is_no_set_of_splits(data: Any):
    with pytest.raises(SampleError, match=r"one dict, and its .* holds no rows\. Pass a list of rows"):
        read_conversations(data)


def test_pictures_in_memory_keep_their_pixels():
    image = Image.open(io.BytesIO(tiny.picture(3)))
    (found,) = read_conversations(
        [{"prompt": [{"role": "user", "content": "What?"}], "images": [image]}]
    ).good
    assert decode(found.seen[0]).image.tobytes() == image.tobytes()  # pyright: ignore[reportArgumentType]


def test_an_id_of_the_hub_is_loaded_where_datasets_is_installed(monkeypatch: pytest.MonkeyPatch):
    import datasets

    data = datasets.Dataset.from_list(BYTES).cast_column("image", datasets.Image())
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **_: {"train": data} if name == "a/b" else 1 / 0
    )
    assert answers("a/b") == answers(Path("a/b")) == ["0", "1", "2"]
    with pytest.raises(SampleError, match=r"x/y is no file here, and .* data set of the hub \(division"):
        read_conversations("x/y")
    monkeypatch.setattr("qprobe.data.sources.hub.find_spec", lambda _: None)
    with pytest.raises(MachineError, match="pip install datasets"):
        read_conversations("a/b")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.xls", b"\xd0\xcf", r"x\.xls is a spreadsheet.* Save it as CSV or JSON Lines: in pandas, "),
        ("x.csv", b"prompt,answer\n", "has no rows"),
        ("x.csv", b'prompt,answer\n"a,b\n', "no complete table"),
        ("x.csv", b"prompt,prompt\na,b\n", "two of one name"),
        ("x.csv", b"prompt,answer\na,\xff\n", "not UTF-8"),
        ("x.jsonl", None, r"x\.jsonl does not exist"),
        ("x.jsonl", b" \n", "is empty"),
        ("x.jsonl", '{"prompt": "a"}'.encode("utf-16"), "is UTF-16"),
        ("x.json", b"[]", "is an empty array"),
        ("x.json", b'[{"prompt": "a"}', "not a complete JSON array"),
        ("x.json", b'[{"prompt": "a"} {"prompt": "b"}]', "not a complete JSON array"),
        ("x.json", b'[,{"prompt": "a"}]', "not a complete JSON array"),
        ("x.json", b"[" * 50_000, "nested too deeply"),
        ("x.json", b'["\xff"]', "not UTF-8"),
        ("x.json", b'{\n "data": []\n}', "is an empty array"),
        ("x.jsonl", b'{"data": []}', "is an empty array"),
        ("x.json", b'{"data": [{"prompt": "a"}], "info": [{}]}', "with the arrays data, info, and only"),
        ("x.json", b'{\n "prompt": "a"\n}\n{\n', r"complete JSON objects \(object 2: "),
        ("x.jsonl", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "is a damaged gzip file"),
        ("x.jsonl", b"PK\3\4 no", "is a zip archive or a spreadsheet"),
        ("x.jsonl.zst", b"\x28\xb5\x2f\xfd no", "is compressed by zstd"),
        ("x.tar", b"\0" * 257 + b"ustar", "is a tar archive"),
        ("x.jsonl", b'[{"prompt": "a"},\n', "not a complete JSON array"),
        ("x.parquet", b"PAR1 no", "not a complete Parquet file"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_sentence(
    name: str, content: bytes | None, said: str, tmp_path: Path
):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SampleError, match=said) as error:
        read_conversations(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_bad_element_of_an_array_costs_that_row_alone(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text('[{"prompt": "a"}, {"prompt": "a", "prompt": "b"}, 7, {"prompt": NaN}, {"prompt": "c"}]')
    found = read_conversations(path)
    assert [x.row for x in found.good] == [1, 5] and [x.row for x in found.skipped] == [2, 3, 4]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_an_array_in_one_line_of_several_costs_that_line_alone(name: str, tmp_path: Path):
    path = tmp_path / name
    path.write_text('[{"role": "user", "content": "a"}]\n{"prompt": "b"}\n')
    found = read_conversations(path)
    assert [x.row for x in found.good] == [2]
    assert found.sentences() == (f"{name} line 1: it is no JSON object.",)


@pytest.mark.parametrize("damage", ["state", "names", "rows"])
def test_a_damaged_saved_dataset_is_one_sentence(damage: str, tmp_path: Path):
    path = saved(tmp_path / "saved")
    if damage == "state":
        (path / "state.json").write_text("{")
    elif damage == "names":
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../x.arrow"}]}))
    else:
        (path / "data-00000-of-00001.arrow").write_bytes(b"no rows")
    with pytest.raises(SampleError, match=r"save_to_disk wrote"):
        read_conversations(path)


def test_what_is_no_source_names_those_that_are(tmp_path: Path):
    with pytest.raises(
        SampleError,
        match=r"is none of these\. Data is read from a folder.* a \.jsonl.* images goes to --images\.",
    ):
        read_conversations(tmp_path)
    for strange in (7, None, b"x"):
        with pytest.raises(QprobeError, match="Data is read from"):
            read_conversations(strange)
    with pytest.raises(SampleError, match="--split train does not apply"):
        read_conversations(lines(tmp_path / "x.jsonl"), Reading(split="train"))


@pytest.mark.parametrize(
    ("bad", "good", "is_error"),
    [(9, 1, False), (10, 90, False), (11, 89, True), (10, 89, True), (1, 0, True)],
)
def test_more_than_a_tenth_and_at_least_ten_left_out_is_an_error(bad: int, good: int, is_error: bool):
    found = read_conversations([*[{"prompt": 5}] * bad, *[{"prompt": "a"}] * good])
    if is_error:
        with pytest.raises(SampleError, match=r"data row 1: its prompt is 5") as error:
            check_left_out(found, "refuse", "train on")
        assert ("--bad-data skip" in str(error.value)) == (good > 0)
    else:
        check_left_out(found, "refuse", "train on")
    if good:
        check_left_out(found, "skip", "train on")
    else:
        with pytest.raises(SampleError, match=r'No row of data is left to train on.*text goes into "prompt"'):
            check_left_out(found, "skip", "train on")


@pytest.fixture
def address() -> Iterator[str]:
    """Of a server on this machine that has one picture."""

    class Handler(http.server.BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self) -> None:
            type(self).asked += 1
            assert type(self).asked == 1 or self.path != "/a.png", "an image is fetched once"
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(tiny.picture(0) if self.path == "/a.png" else b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_are_fetched_on_request_alone(address: str):
    rows = [{**ROWS[0], "image": f"{address}/a.png"}] * 2
    refused = read_conversations(rows)
    assert refused.good == () and "--allow-downloads" in refused.skipped[0].why
    assert answers(rows, Reading(downloads=True)) == ["0", "0"]
    gone = read_conversations([{**ROWS[0], "image": f"{address}/b.png"}], Reading(downloads=True))
    assert "cannot be fetched" in gone.skipped[0].why
