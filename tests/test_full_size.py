"""What the full-size benchmark runs on: the exact geometry, and samples of the size it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qprobe.data.sampling import Wanted, from_data
from qprobe.loading.reference import load_reference
from qprobe.loading.skeleton import meta_model, skeleton_of
from qprobe.loading.source import resolve
from qprobe.measure.subject import subject_of
from qprobe.models.headers import read_headers
from qprobe.records import FormatSpec
from tests.benchmarks import mixture
from tests.benchmarks.checkpoints import geometry, processor, write_checkpoint, write_samples
from tests.benchmarks.full_size_streamed import column_differences, largest_difference
from tests.benchmarks.generated import generated, write_outline


def stored_bytes(model: torch.nn.Module) -> int:
    return sum(x.nbytes for x in model.state_dict().values())


def test_the_geometry_is_that_of_the_published_model():
    # 10,670,220,835 parameters of two bytes, as the hub says of meta-llama/Llama-3.2-11B-Vision-Instruct.
    model = meta_model(geometry(1.0, False), "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 10_670_220_835
    half = meta_model(geometry(0.5, False), "bfloat16")
    assert 0.5 < stored_bytes(half) / stored_bytes(model) < 0.56  # embeddings and head are not halved


def test_the_larger_geometry_is_that_of_the_published_model_too():
    # 88,593,355,323 parameters, counted by hand from its shapes in tests/models/by_hand.py.
    model = meta_model(geometry(1.0, False, "90b"), "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 88_593_355_323


@pytest.mark.slow
def test_weights_that_no_disk_holds_are_the_same_in_every_process(tmp_path: Path):
    config = geometry(1.0, True, "90b")
    total = write_outline(tmp_path / "model", config, [processor(config)])
    file = tmp_path / "model" / "model.safetensors"
    assert total == stored_bytes(meta_model(config, "bfloat16")) < file.stat().st_size
    assert file.stat().st_blocks * 512 < total / 2  # a header, and a hole
    skeleton = skeleton_of(resolve(str(tmp_path / "model")), "bfloat16")
    first, second = (
        generated(skeleton, dtype=torch.bfloat16, device_map={"": torch.device("cpu")}) for _ in range(2)
    )
    weights = dict(second.named_parameters())
    for name, weight in first.named_parameters():
        assert torch.equal(weight, weights[name]), name
        assert weight.dim() < 2 or 0.015 < weight.float().std() < 0.025, name  # 0.02 is drawn
    attention = [w for name, w in weights.items() if name.endswith("q_proj.weight")]
    assert not torch.equal(attention[0], attention[1])  # of the same shape, by their names
    ids = torch.full((1, 4), 5)
    assert torch.isfinite(first(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()


def test_the_mixture_is_that_of_the_published_model():
    # total_size of Qwen/Qwen3-30B-A3B's index; a layer has attention, its norms, router and 128 experts.
    whole = mixture.model_bytes(mixture.geometry(None, False))
    assert whole == 61_064_245_248
    attention = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048 + 2 * 128
    layer = attention + 2 * 2048 + 128 * 2048 + 128 * 3 * 768 * 2048
    assert mixture.model_bytes(mixture.geometry(40, False)) == whole - 8 * 2 * layer


def test_a_mixture_without_room_is_refused_before_it_is_written():
    with pytest.raises(SystemExit, match="Pass fewer --layers"):
        mixture.place(2**60)


@pytest.mark.slow
def test_a_checkpoint_loads_whole_and_its_samples_have_the_promised_tokens(tmp_path: Path):
    config = geometry(1.0, True)
    parts = [processor(config)]
    total = write_checkpoint(tmp_path / "model", config, parts, "cpu", shard_bytes=10**6)
    headers = read_headers(tmp_path / "model")
    assert total == sum(x.nbytes for x in headers.values()) == stored_bytes(meta_model(config, "bfloat16"))
    assert len({x.file for x in headers.values()}) > 1
    reference = load_reference(str(tmp_path / "model"), "cpu")
    gates = [p for n, p in reference.model.named_parameters() if n.endswith("gate_attn") or "gate_mlp" in n]
    assert gates and all(p.item() == 0.5 for p in gates if p.numel() == 1)  # cross-attention is open
    samples = from_data(Wanted(data=write_samples(tmp_path / "samples", config, 3)), 3).samples
    subject = subject_of(reference, FormatSpec())
    (group,) = subject.groups(samples, 4)
    batch = subject.encode(group)
    assert batch.inputs["input_ids"].shape == (3, 256 + 64) and batch.answer_tokens == 3 * 64
    assert batch.inputs["aspect_ratio_ids"].tolist() == [[6]] * 3  # 2 x 2 tiles
    assert torch.isfinite(reference.model(**batch.inputs).logits).all()


def test_tables_differ_by_their_worst_number(tmp_path: Path):
    def written(name: str, *lines: str) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(["layer,tower,kl,se", *lines]))
        return path

    first = written("a", "x,vision,2.0,", "y,language,0.0,1.0")
    assert largest_difference(first, written("b", "x,vision,2.0,", "y,language,0.0,1.0"))["difference"] == 0
    found = largest_difference(first, written("c", "x,vision,2.5,", "y,language,0.0,1.1"))
    assert found == {"difference": 0.25, "column": "kl", "layer": "x"}
    for other in (("x,vision,2.0,3.0", "y,language,0.0,1.0"), ("x,vision,2.0,", "y,language,1e-9,1.0")):
        assert largest_difference(first, written("d", *other))["difference"] == float("inf")
    swapped = written("e", "y,language,0.0,1.0", "x,vision,2.0,")
    assert largest_difference(first, swapped)["column"] == "layer"


def test_columns_differ_in_their_sum_their_layers_and_beside_the_largest(tmp_path: Path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("layer,kl,same\nx,8.0,1\ny,2.0,1\n")
    second.write_text("layer,kl,same\nx,7.0,1\ny,2.0,1\n")
    # 9 instead of 10; the layers differ by 1/8 and by nothing; 1 of 8
    (line,) = column_differences(first, second)
    assert line == {"column": "kl", "total": 0.1, "median": 0.0625, "largest": 0.125}
