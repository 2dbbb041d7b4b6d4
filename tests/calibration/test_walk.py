"""One walk over the blocks of a model gives what whole passes give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

from qprobe.calibration.gram import Gathering, Gram, SharedInput, gathered, gram_bytes, shared_inputs
from qprobe.calibration.walk import Plan, Walk, gathered_in_turn, planned
from qprobe.inputs.batch import Batch
from qprobe.measure.attribution import walking
from qprobe.measure.subject import Subject
from qprobe.records import Sample, asked
from tests.calibration.test_calibrate import samples_of, subject_for

TinyFolder = Callable[[str], Path]
CPU = torch.device("cpu")


def batches_of(subject: Subject, name: str) -> list[Batch]:
    """Two batches of different shapes."""
    samples = samples_of(name, 3)
    groups = subject.groups(tuple(samples[:2]), 2) + subject.groups(tuple(samples[2:]), 1)
    return [subject.encode(group).in_dtype(subject.path.dtype) for group in groups]


def in_turn(subject: Subject, walk: Walk | None, plan: Plan, batches: list[Batch]) -> dict[str, Gram]:
    found: dict[str, Gram] = {}
    for gathering in gathered_in_turn(subject, walk, plan, lambda: batches, len(batches)):
        assert not gathering.apart
        found |= gathering.grams
    return found


def runs_of_blocks(subject: Subject, walk: Walk) -> list[int]:
    """How often each block has run from now on."""
    counts = [0] * len(walk.blocks)
    for number, block in enumerate(walk.blocks):

        def count(*_: object, number: int = number) -> None:
            counts[number] += 1

        block.register_forward_pre_hook(count)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllama", "llama", "qwen2_vl", "bert"])
def test_a_walk_gives_the_matrices_of_whole_passes_to_the_last_bit(name: str, tiny_folder: TinyFolder):
    # The same operations run on the same tensors, so nothing may differ at all.
    subject = subject_for(tiny_folder(name))
    batches = batches_of(subject, name)
    inputs = shared_inputs(subject, batches)
    with walking(subject.path):
        wanted = gathered(subject, inputs, batches).grams
    walk = Walk(subject, 2**30)
    plan = planned(walk, inputs, 2**30, CPU)
    inside = {one.leader for group in plan.blocks for _, part in group for one in part}
    assert len(inside) > len(inputs) // 2 and len(plan.passes) == 1
    counts = runs_of_blocks(subject, walk)
    found = in_turn(subject, walk, plan, batches)
    assert found.keys() == wanted.keys()
    for leader, gram in found.items():
        assert gram.tokens == wanted[leader].tokens
        assert torch.equal(gram.total, wanted[leader].total), leader
    # Once for the record, once for the matrices.
    assert max(counts) <= 2 * len(batches)
    assert not any(one.calls or one.handed_on for one in walk.recorded)


def test_what_a_block_put_out_is_handed_on_and_not_kept(tiny_folder: TinyFolder):
    # Hidden states are those of the first block only; positions that both read are one tensor each.
    subject = subject_for(tiny_folder("llama"))
    batches = batches_of(subject, "llama")
    walk = Walk(subject, 2**30)
    assert len(walk.blocks) == 3
    walk.record(Gathering(subject, []), batches, len(batches), lambda: None)
    for one in walk.recorded:
        assert [(key.block, last) for key, last in one.last_use.items()] == [(0, 1), (1, 2)]
        hidden, *_ = one.calls[0][0][0]
        assert hidden.tensor.shape[:2] == one.batch.kinds.shape
        first, second = ({id(x) for x in _kept(one.calls[number])} for number in (0, 1))
        assert second and second < first


@pytest.mark.slow
def test_a_tensor_that_many_blocks_read_is_kept_once(tiny_folder: TinyFolder):
    # Python gives the ids of tensors that are gone to others.
    subject = subject_for(tiny_folder("mllama"))
    batches = batches_of(subject, "mllama")
    walk = Walk(subject, 2**30)
    walk.record(Gathering(subject, []), batches, len(batches), lambda: None)
    for one in walk.recorded:
        kept = {id(x): x.tensor for calls in one.calls.values() for x in _kept(calls)}
        wide = [x for x in kept.values() if x.numel() > 1000]
        assert wide
        for number, x in enumerate(wide):
            assert not [y for y in wide[:number] if torch.equal(x, y)], x.shape


def test_what_has_room_stays_on_the_device(tiny_folder: TinyFolder):
    # Nothing can be copied from "meta" to the host, so it stands for a GPU as long as there is room.
    walk = Walk(subject_for(tiny_folder("llama")), room_bytes=96)
    for size in (64, 32):
        kept = walk._keep(torch.empty(size, dtype=torch.uint8, device="meta"))
        assert kept.tensor.device == kept.device == torch.device("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        walk._keep(torch.empty(1, dtype=torch.uint8, device="meta"))


def _kept(calls: list) -> list:
    flat = tree_flatten(calls)[0]
    return [x for x in flat if hasattr(x, "tensor")]


def test_less_memory_runs_blocks_more_often_and_changes_nothing(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    batches = batches_of(subject, "llama")
    inputs = shared_inputs(subject, batches)
    most, least = (planned(Walk(subject, 0), inputs, limit, CPU) for limit in (2**40, gram_bytes(96, CPU)))
    assert len(most.blocks) == 1 and most.runs == 4
    assert len(least.blocks) > 6 and least.runs > 8
    found = [in_turn(subject, Walk(subject, 0), plan, batches) for plan in (most, least)]
    assert all(torch.equal(gram.total, found[1][leader].total) for leader, gram in found[0].items())


def test_blocks_before_the_first_that_is_wanted_hand_on_what_it_reads(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    batches = batches_of(subject, "llama")
    one = next(x for x in shared_inputs(subject, batches) if "layers.1.mlp.down_proj" in x.leader)
    walk = Walk(subject, 0)
    plan = planned(walk, [one], 2**30, CPU)
    assert plan == Plan([[]], [[(0, []), (1, [one])]])
    with walking(subject.path):
        wanted = gathered(subject, [one], batches).grams[one.leader].total
    assert torch.equal(in_turn(subject, walk, plan, batches)[one.leader].total, wanted)


def test_where_the_host_has_no_room_for_the_record_the_whole_model_runs(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
):
    subject = subject_for(tiny_folder("llama"))
    batches = batches_of(subject, "llama")
    inputs = shared_inputs(subject, batches)
    with walking(subject.path):
        wanted = gathered(subject, inputs, batches).grams
    walk = Walk(subject, 0)
    plan = planned(walk, inputs, 2**30, CPU)
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("qprobe.calibration.walk.psutil.virtual_memory", memory)
    found = in_turn(subject, walk, plan, batches)
    assert not walk.recorded
    assert all(torch.equal(gram.total, wanted[leader].total) for leader, gram in found.items())


def test_tokens_are_weighed_by_batch_as_in_whole_passes(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("llama"))
    batches = batches_of(subject, "llama")
    inputs = shared_inputs(subject, batches)

    def weights(leader: str, batch: int) -> torch.Tensor:
        tokens = batches[batch].kinds.numel()
        return torch.rand(tokens, generator=torch.Generator().manual_seed(len(leader) + batch))

    with walking(subject.path):
        wanted = gathered(subject, inputs, batches, weights=weights).grams
    walk = Walk(subject, 0)
    plan = planned(walk, inputs, 2**30, CPU)
    for gathering in gathered_in_turn(subject, walk, plan, lambda: batches, len(batches), weights):
        for leader, gram in gathering.grams.items():
            assert torch.equal(gram.total, wanted[leader].total)


def test_an_input_that_blocks_share_is_summed_in_the_pass_of_the_whole_model(tiny_folder: TinyFolder):
    subject = subject_for(tiny_folder("mllama"))
    walk = Walk(subject, 0)
    inputs = shared_inputs(subject, batches_of(subject, "mllama"))
    outside, inside = walk.by_block(inputs)
    assert ["multi_modal_projector" in one.leader for one in outside] == [True]
    first, second = [part[0] for part in inside if part][:2]
    both = SharedInput((*first.names, *second.names), first.in_features)
    assert walk.by_block([both])[0] == [both]
    assert sum(map(len, inside)) + len(outside) == len(inputs)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_blocks_with_fused_experts_give_the_matrices_of_whole_passes(name: str, mixture: TinyFolder):
    # Their products run as in a pass of the whole model, on the same tensors.
    subject = subject_for(mixture(name))
    batch = subject.encode(
        tuple(Sample(str(i), asked(x), answer="a bag") for i, x in enumerate(("a red", "it")))
    )
    batch = batch.in_dtype(subject.path.dtype)
    inputs = shared_inputs(subject, [batch])
    with walking(subject.path):
        wanted = gathered(subject, inputs, [batch]).grams
    walk = Walk(subject, 0)
    found = in_turn(subject, walk, planned(walk, inputs, 2**30, CPU), [batch])
    assert found.keys() == wanted.keys() and found
    assert all(torch.equal(gram.total, wanted[leader].total) for leader, gram in found.items())
