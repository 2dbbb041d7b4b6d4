"""What a run measures is told from anything else by one bit, wherever it lies."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from qprobe.loading.reference import load_reference
from qprobe.measure import digests
from qprobe.measure.digests import reading_digest, weights_digest
from qprobe.measure.files import files_digest
from tests import tiny

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.bool)


class Holder(nn.Module):
    """Two tensors under names, the second one a buffer."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first = nn.Parameter(first, requires_grad=False)
        self.register_buffer("second", second)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK", 7)


def flipped(tensor: Tensor, element: int) -> Tensor:
    """`tensor` with the lowest bit of one element flipped."""
    changed = tensor.clone()
    raw = changed.view(-1).view(torch.uint8)
    raw[element * tensor.element_size()] ^= 1
    return changed


@pytest.mark.slow
@given(dtype=st.sampled_from(DTYPES), rows=st.integers(1, 9), data=st.data())
def test_any_bit_of_any_element_changes_the_digest_of_weights(dtype: torch.dtype, rows: int, data):
    torch.manual_seed(0)
    first, second = (torch.randn(rows, 5).clamp(0, 3).to(dtype) for _ in range(2))
    element = data.draw(st.integers(0, first.numel() - 1))
    found = {
        weights_digest(Holder(*tensors), CPU)
        for tensors in (
            (first, second),
            (flipped(first, element), second),
            (first, flipped(second, element)),
        )
    }
    assert len(found) == 3
    assert weights_digest(Holder(first.clone(), second.clone()), CPU) in found


def test_places_shapes_types_and_names_enter_the_digest_of_weights():
    base = torch.arange(20.0).reshape(4, 5)
    other = torch.zeros(0, 3)
    swapped = base[[1, 0, 2, 3]]
    found = [
        weights_digest(Holder(*tensors), CPU)
        for tensors in (
            (base, other),
            (swapped, other),
            (base.reshape(5, 4), other),
            (base.view(torch.int32).view(torch.float32), torch.zeros(3, 0)),
            (other, base),
        )
    ]
    assert len(set(found)) == len(found)
    transposed = base.t().contiguous().t()  # the same values in another order of memory
    assert weights_digest(Holder(transposed, other), CPU) == found[0]


def test_what_was_read_is_let_go_once_each():
    let_go: list[tuple[int, ...]] = []
    model = Holder(torch.ones(3, 4), torch.ones(2))
    model.tied = model.first
    weights_digest(model, CPU, lambda tensor: let_go.append(tuple(tensor.shape)))
    assert sorted(let_go) == [(2,), (3, 4)]


@pytest.mark.slow
@given(element=st.integers(0, 40 * 30 - 1))
def test_any_bit_of_a_file_changes_its_digest(element: int, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("files")
    weight = torch.arange(40.0 * 30).reshape(40, 30).to(torch.bfloat16)
    for name, tensor in (("a", weight), ("b", flipped(weight, element)), ("c", weight)):
        save_file({"w": tensor}, folder / f"{name}.safetensors")
    a, b, c = (files_digest(folder, [(f"{name}.safetensors", "w")]) for name in "abc")
    assert a == c != b


def test_a_change_of_the_processor_that_one_sample_shows_is_seen(tiny_folder, tmp_path: Path):
    processor = load_reference(str(tiny_folder("mllama")), "cpu").processor
    samples = tiny.questions("mllama", 3)
    before = reading_digest(processor, samples)
    assert before == reading_digest(processor, samples)
    assert before != reading_digest(processor, samples[:2])
    tiles = deepcopy(processor)
    tiles.image_processor.max_image_tiles += 1
    assert reading_digest(tiles, samples) != before
    template = deepcopy(processor)
    template.chat_template = (template.chat_template or "") + "{{ 'one' }}"
    assert reading_digest(template, samples) != before


def test_weights_of_places_are_odd_and_those_of_any_longer_tensor():
    eight = digests._Sums(CPU)._first(7).tolist()
    for count in range(1, 8):
        assert digests._Sums(CPU)._first(count).tolist() == eight[:count]
    assert all(x % 2 == 1 for x in eight) and len(set(eight)) == 7
