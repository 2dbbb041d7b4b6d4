"""Reading safetensors headers: the same as the library reads, and hostile files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qprobe.errors import ModelError
from qprobe.models.headers import INDEX, SINGLE, read_config, read_headers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a.weight": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(4)}, tmp_path / SINGLE)
    return tmp_path


def shards(folder: Path, weight_map: object) -> None:
    (folder / SINGLE).rename(folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_headers_are_what_the_library_reads(folder: Path):
    found = read_headers(folder)
    with safe_open(folder / SINGLE, "pt") as file:
        assert {k: (x.shape, x.nbytes) for k, x in found.items()} == {
            key: (tuple(file.get_tensor(key).shape), file.get_tensor(key).nbytes) for key in file.keys()
        }
    assert found["a.weight"].dtype == "BF16" and found["b"].dtype == "F32"


def test_shards_are_joined(folder: Path):
    shards(folder, {"a.weight": "one.safetensors", "b": "one.safetensors"})
    assert {k: x.file for k, x in read_headers(folder).items()} == dict.fromkeys(
        ("a.weight", "b"), "one.safetensors"
    )


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a.weight": "two.safetensors"}, "two.safetensors, which is missing with 1 tensors"),
        ({"c": "one.safetensors"}, "lists c in one.safetensors, which does not hold it"),
        ({"a.weight": "../one.safetensors"}, "lies elsewhere"),
        (["a.weight"], "no weight_map"),
        ({"a.weight": 3}, "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit(folder: Path, weight_map: object, said: str):
    shards(folder, weight_map)
    with pytest.raises(ModelError, match=said):
        read_headers(folder)


def write(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    announced = len(header) if length is None else length
    (folder / SINGLE).write_bytes(announced.to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "damaged"),
        (b"[]", "damaged"),
        (b'{"a": 1}', "damaged"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "damaged"),
        (b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 0]}}', "damaged"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "4 to 0"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "ends at byte 4 of 0"),
        (b'{"a": {}, "a": {}}', "twice"),
        (b"\xff", "damaged"),
    ],
)
def test_a_damaged_header(tmp_path: Path, header: bytes, said: str):
    write(tmp_path, header)
    with pytest.raises(ModelError, match=said):
        read_headers(tmp_path)


@pytest.mark.parametrize("length", [3, 2**63])
def test_a_header_that_is_cut_off(tmp_path: Path, length: int):
    write(tmp_path, b"{}", length=length)
    with pytest.raises(ModelError, match="is cut off or no safetensors file"):
        read_headers(tmp_path)


def test_every_cut_of_a_file_is_refused(folder: Path):
    whole = (folder / SINGLE).read_bytes()
    for size in (0, 4, 8, 40, len(whole) - 1):
        (folder / SINGLE).write_bytes(whole[:size])
        with pytest.raises(ModelError, match="cut off"):
            read_headers(folder)


def test_no_weights_and_no_config_are_named(tmp_path: Path):
    with pytest.raises(ModelError, match="no weights"):
        read_headers(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, a pickle"):
        read_headers(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="no JSON object"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match="is no folder"):
        read_config(tmp_path / "nowhere")


def test_the_single_file_comes_before_an_index_as_transformers_takes_it(folder: Path):
    save_file({"c": torch.zeros(2)}, folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"c": "one.safetensors"}}))
    assert set(read_headers(folder)) == {"a.weight", "b"}


@pytest.mark.parametrize(("dtype", "shape"), [("F32", [3]), ("BF16", [2, 2]), ("U8", [-4, -2])])
def test_a_tensor_whose_bytes_are_not_those_of_its_shape(folder: Path, dtype: str, shape: list[int]):
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 7]}}).encode()
    write(folder, header, bytes(7))
    with pytest.raises(ModelError, match=r"is damaged \(a tensor of .* has 7 bytes\)"):
        read_headers(folder)


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', 2, "end at byte 1 of 2"),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}', 2, "begins at byte 1"),
        (
            b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},'
            b' "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}',
            3,
            "begins at byte 1, and the one before ends at 2",
        ),
        (b'{"__metadata__": {"a": 1}}', 0, "__metadata__ holds something that is no text"),
        (b'{"__metadata__": []}', 0, "__metadata__ holds something that is no text"),
    ],
)
def test_what_the_library_refuses_is_refused(tmp_path: Path, header: bytes, data: int, said: str):
    write(tmp_path, header, bytes(data))
    with pytest.raises(SafetensorError), safe_open(tmp_path / SINGLE, "np"):
        pass
    with pytest.raises(ModelError, match=said):
        read_headers(tmp_path)


offsets = st.integers(0, 4)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "U8", "F16", "x"]),
        "shape": st.lists(st.integers(0, 3), max_size=2),
        "data_offsets": st.tuples(offsets, offsets),
    }
)


@pytest.mark.slow
@given(
    tensors=st.dictionaries(st.sampled_from("abc"), entries, max_size=3),
    metadata=st.sampled_from([None, {}, {"a": "b"}, {"a": 1}, [], "a"]),
    data=offsets,
    around=st.sampled_from(["{}", " {}", "{} ", "{}x", "[{}]"]),
)
def test_nothing_that_the_library_refuses_passes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict, metadata: object, data: int, around: str
):
    folder = tmp_path_factory.getbasetemp()
    text = json.dumps({**tensors, **({} if metadata is None else {"__metadata__": metadata})})
    write(folder, around.replace("{}", text).encode(), bytes(data))
    try:
        read_headers(folder)
    except ModelError:
        return
    if all(x["dtype"] != "x" for x in tensors.values()):  # a dtype that is newer than the library is read
        with safe_open(folder / SINGLE, "np"):
            pass
