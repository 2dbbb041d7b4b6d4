"""Gram matrices of a model's inputs, and the calibrated weights that come of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qprobe.calibration import calibrate as calibration
from qprobe.calibration import room
from qprobe.calibration.calibrate import calibrate_model, calibrate_units, codes_unit
from qprobe.calibration.codes import Readers, calibrate, workspace_bytes
from qprobe.calibration.gptq import shrunk
from qprobe.calibration.gram import APART, Gathering, SharedInput, gathered, gram_bytes, passes, shared_inputs
from qprobe.calibration.room import gram_room, rounded_together, rounding_bytes
from qprobe.calibration.token_weights import DRAWS, token_weights
from qprobe.calibration.two_sided import moving_bytes
from qprobe.calibration.work import Work
from qprobe.errors import MachineError, ManifestError
from qprobe.formats.codes_file import FILE_NAME, join_codes, open_codes, sha256_of
from qprobe.formats.nf4 import Nf4
from qprobe.inputs.batch import PAD
from qprobe.loading.reference import load_reference
from qprobe.measure.attribution import walking
from qprobe.measure.memory import LIBRARIES_BYTES, SPARE
from qprobe.measure.subject import Subject, limited_subject, subject_of
from qprobe.records import FormatSpec
from qprobe.registry.precisions import NF4_CALIBRATED
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import VERSION, Key, Measures, Spec
from tests import tiny

PARTS = ((0, 1), (2, 3))


def subject_for(folder: Path) -> Subject:
    return subject_of(load_reference(str(folder), "cpu"), FormatSpec(NF4_CALIBRATED.name))


def samples_of(name: str, count: int = 4) -> list:
    given = tiny.questions(name, count)
    return [replace(s, answer="the red bar, by two units" if i % 2 else "no") for i, s in enumerate(given)]


def work_in(folder: Path, subject: Subject, name: str, limit: int = 2**40) -> Work:
    run, spec = RunFolder(folder), Spec("weights", "cpu", Measures(False, False))
    run.open(
        Key(VERSION, subject.reference.identity, FormatSpec(NF4_CALIBRATED.name), subject.inventory, spec)
    )
    groups = subject.groups(tuple(samples_of(name)), 2)
    return Work(subject, run, groups, limit)


def weights(subject: Subject) -> dict[str, torch.Tensor]:
    return {name: subject.dequantized.weight(name) for name in subject.modules}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllama", "llama", "bert"])
def test_gram_matrices_are_sums_of_outer_products_over_tokens_that_are_no_padding(name, tiny_folder):
    # The oracle hooks every linear, runs one sample at a time (so without padding), and loops over tokens.
    subject = subject_for(tiny_folder(name))
    batch = subject.encode(tuple(samples_of(name)))
    assert name == "mllama" or bool((batch.kinds == PAD).any())
    inputs = shared_inputs(subject, [batch])
    found = gathered(subject, inputs, [batch])
    wanted: dict[str, torch.Tensor] = {}

    def note(layer: str):
        def hook(_module: nn.Module, args: tuple) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            wanted[layer] = wanted.get(layer, torch.zeros(1)) + sum(torch.outer(row, row) for row in rows)

        return hook

    handles = [m.register_forward_pre_hook(note(n)) for n, m in subject.modules.items()]
    with torch.no_grad():
        for sample in batch.samples:
            subject.model(**subject.encode((sample,)).inputs)
    for handle in handles:
        handle.remove()
    leaders = {layer: one.leader for one in inputs for layer in one.names}
    assert set(leaders) == set(subject.quantized)
    for layer, leader in leaders.items():
        gram = found.grams[leader].total
        # bf16 activations differ in the last bit between batch sizes
        error = torch.linalg.matrix_norm(gram - wanted[layer]) / torch.linalg.matrix_norm(wanted[layer])
        assert float(error) < 0.02, layer


@pytest.mark.slow
def test_tiles_that_no_text_attends_to_do_not_count_behind_the_vision_tower(tiny_folder):
    # Of two images of two tiles the second has a tile of padding only: three of four tiles count.
    subject = subject_for(tiny_folder("mllama"))
    batch = subject.encode(tuple(samples_of("mllama", 2)))
    mask = torch.ones_like(batch.inputs["cross_attention_mask"])
    assert mask.shape[2:] == (1, 2)
    mask[1, :, 0, 1] = 0
    batch = replace(batch, inputs={**batch.inputs, "cross_attention_mask": mask})
    inputs = shared_inputs(subject, [batch])
    read: dict[str, torch.Tensor] = {}
    handles = [
        subject.modules[one.leader].register_forward_pre_hook(
            lambda _, args, name=one.leader: read.update({name: args[0].detach().double()})
        )
        for one in inputs
    ]
    found = gathered(subject, inputs, [batch])
    with torch.no_grad():
        subject.model(**batch.inputs)
    for handle in handles:
        handle.remove()
    counted = {}
    for one in inputs:
        layer, gram = subject.layers[one.leader], found.grams[one.leader]
        if layer.reads == "vision":
            rows = read[one.leader].reshape(4, -1, one.in_features)
            rows = (rows if layer.tower == "vision" else rows[:3]).flatten(0, 1)
            counted[layer.tower] = gram.tokens / rows.shape[0]
            assert torch.allclose(
                gram.total, rows.T @ rows, rtol=1e-2, atol=1e-2 * float(rows.square().sum())
            )
    assert counted == {"vision": 1, "projector": 1, "cross_attention": 1}


@pytest.mark.slow
def test_linears_that_read_one_tensor_share_one_matrix(tiny_folder):
    subject = subject_for(tiny_folder("mllama"))
    inputs = shared_inputs(subject, [subject.encode(tuple(samples_of("mllama", 2)))])
    together = {frozenset(name.rpartition(".")[2] for name in one.names) for one in inputs}
    assert {"q_proj", "k_proj", "v_proj"} in together and {"gate_proj", "up_proj"} in together
    cross = [one.names for one in inputs if any("cross_attn.k_proj" in n for n in one.names)]
    assert len(cross) == 1  # every cross-attention reads the same vision states
    assert sorted(n for one in inputs for n in one.names) == sorted(subject.quantized)


def test_a_linear_that_reads_something_else_on_a_later_batch_is_found_out(tiny_folder):
    subject = subject_for(tiny_folder("llama"))
    batch = subject.encode(tuple(samples_of("llama", 2)))
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    gathering = Gathering(subject, [SharedInput((first, second), 64)])
    gathering.add(batch)
    assert gathering.apart == {second: APART}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mllama", "llama"])
@pytest.mark.usefixtures("quick_rounding")
def test_sums_of_two_halves_of_the_samples_give_the_same_codes_as_one(name, tiny_folder):
    subject = subject_for(tiny_folder(name))
    batches = [subject.encode(group) for group in subject.groups(tuple(samples_of(name)), 1)]
    inputs = shared_inputs(subject, batches[:1])
    whole = gathered(subject, inputs, batches)
    halves = [gathered(subject, inputs, batches[part::2]) for part in (1, 0)]
    for one in inputs:
        layers = [subject.modules[n].weight for n in one.names]
        parts = [half.grams[one.leader] for half in halves]
        assert sum(p.tokens for p in parts) == whole.grams[one.leader].tokens
        both = Readers(layers, parts[0].total + parts[1].total, sum(p.tokens for p in parts))
        gram = whole.grams[one.leader]
        merged, alone = calibrate(both, Nf4()), calibrate(Readers(layers, gram.total, gram.tokens), Nf4())
        for a, b in zip(merged, alone, strict=True):
            assert (a.stored is None) == (b.stored is None)
            assert a.stored is None or torch.equal(a.stored.codes, b.stored.codes)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_two_shards_of_units_give_the_same_file_as_one(tiny_folder, tmp_path):
    subject = subject_for(tiny_folder("llama"))
    one, two = (work_in(tmp_path / name, subject, "llama") for name in ("one", "two"))
    inputs = shared_inputs(subject, one.batches)
    calibrate_model(one)
    for rank in (1, 0):
        calibrate_units(two, inputs, range(len(inputs))[rank::2])
    calibrate_model(two)
    assert sha256_of(one.run.path / FILE_NAME) == sha256_of(two.run.path / FILE_NAME)
    assert one.run.codes == two.run.codes is not None


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_less_memory_runs_blocks_more_often_and_changes_nothing(tiny_folder, tmp_path):
    subject = subject_for(tiny_folder("llama"))
    whole, blocks, files = [], [], []
    counted = [(subject.model, whole), *((block, blocks) for block in subject.model.model.layers)]
    handles = [m.register_forward_pre_hook(lambda *_, to=to: to.append(1)) for m, to in counted]
    for limit in (2**40, gram_bytes(96, torch.device("cpu"))):
        work = work_in(tmp_path / str(limit), subject, "llama", limit)
        whole.clear()
        blocks.clear()
        calibrate_model(work)
        files.append((len(whole), len(blocks), sha256_of(work.run.path / FILE_NAME)))
    for handle in handles:
        handle.remove()
    # The model: a survey of one batch, gradients of two batches, and their record.
    assert files[0][0] == files[1][0] == 1 + 2 * DRAWS + 2
    # Each of three blocks: as often, and once more for its matrices or several times.
    assert files[0][1] == 3 * (files[0][0] + 2) and files[1][1] > files[0][1] + 10
    assert files[0][2] == files[1][2]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_a_limit_on_a_cpu_runs_the_whole_model_and_changes_nothing(tiny_folder, tmp_path):
    subject = subject_for(tiny_folder("llama"))
    reference = load_reference(str(tiny_folder("llama")), "cpu", on_host=True)
    limited = limited_subject(reference, FormatSpec(NF4_CALIBRATED.name), 2**40, tmp_path)
    files = []
    for name, one in (("walk", subject), ("passes", limited)):
        work = replace(work_in(tmp_path / name, one, "llama"), limit_bytes=None)
        with one.streaming():
            calibrate_model(work)
        files.append(sha256_of(work.run.path / FILE_NAME))
    assert files[0] == files[1]


def test_passes_keep_order_and_fit_the_limit():
    inputs = [SharedInput((str(i),), n) for i, n in enumerate((64, 64, 96, 64, 128))]
    device = torch.device("cpu")
    limit = 2 * gram_bytes(64, device)
    parts = passes(inputs, limit, device)
    assert [[x.in_features for x in part] for part in parts] == [[64, 64], [96], [64], [128]]
    assert [x for part in parts for x in part] == inputs


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_finished_units_are_not_done_again(tiny_folder, tmp_path, monkeypatch):
    subject = subject_for(tiny_folder("llama"))
    work = work_in(tmp_path, subject, "llama")
    inputs = shared_inputs(subject, work.batches)
    calibrate_units(work, inputs, range(4))
    codes_unit(tmp_path, 2).unlink()  # a unit whose weights are gone is not finished
    done = []
    finish = calibration._finish
    monkeypatch.setattr(calibration, "_finish", lambda *a: (done.append(a[-1]), finish(*a)))
    calibrate_model(work)
    assert done == [2, *range(4, len(inputs))]
    first = weights(subject)
    done.clear()
    calibrate_model(work_in(tmp_path, subject_for(tiny_folder("llama")), "llama"))
    assert done == []
    again = subject_for(tiny_folder("llama"))
    codes_unit(tmp_path, 1).write_bytes(b"left by a process that ended before it cleaned up")
    calibrate_model(replace(work, subject=again))
    assert all(torch.equal(w, first[n]) for n, w in weights(again).items())
    assert not list((tmp_path / "units").glob("*.safetensors"))


@pytest.mark.slow
def test_calibrated_weights_err_less_on_what_the_layers_read(tiny_folder, tmp_path):
    subject = subject_for(tiny_folder("mllama"))
    nearest = weights(subject)
    work = work_in(tmp_path, subject, "mllama")
    inputs = shared_inputs(subject, work.batches)
    with walking(subject.path):
        counts = token_weights(subject, inputs, work.widened)
        grams = gathered(subject, inputs, work.widened, weights=counts.of).grams
    calibrate_model(work)
    rows = RunFolder(tmp_path).units("calibration").set_index("layer")
    with open_codes(tmp_path / FILE_NAME) as file:
        assert file.layers == set(rows.index[rows["why"] == ""])
    for one in inputs:
        gram = shrunk(grams[one.leader].total.float(), grams[one.leader].tokens).double()
        for name in one.names:
            own = subject.modules[name].weight.double()
            errors = [w.double() - own for w in (subject.dequantized.weight(name), nearest[name])]
            calibrated, plain = (float(((e @ gram) * e).sum()) for e in errors)
            assert calibrated <= plain * (1 + 1e-6)
            if rows.loc[name, "why"] == "":
                assert calibrated / plain == pytest.approx(float(rows.loc[name, "error"]), rel=1e-3)
    assert (rows["why"] == "").mean() > 0.9 and rows["error"].median() < 0.8


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rounding")
def test_layers_that_are_left_to_nearest_are_named_with_the_reason(tiny_folder, tmp_path):
    subject = subject_for(tiny_folder("llama"))
    broken = "model.layers.1.mlp.down_proj"
    subject.modules[broken].weight.data[0, 0] = float("nan")
    work = work_in(tmp_path, subject, "llama")
    calibrate_model(work)
    notes = " ".join(calibration.calibration_notes(work.run))
    assert f"its weights are not finite): {broken}" in notes and "its inputs are not finite" in notes


def test_matrices_get_what_a_memory_limit_leaves_beside_the_larger_of_running_and_rounding(
    tiny_folder, tmp_path, monkeypatch
):
    reference = load_reference(str(tiny_folder("llama")), "cpu", on_host=True)
    subject = limited_subject(reference, FormatSpec(NF4_CALIBRATED.name), 2**40, tmp_path)
    assert subject.limit is not None
    inputs = [SharedInput(("model.layers.0.mlp.down_proj",), 96)]  # 64 outputs, in 16-bit
    rounding = workspace_bytes(64, 96) + 2 * 64 * 96 + moving_bytes([64], 96)
    limits = [
        (1_000, rounding),
        (8_000_000, 10_000_000),
    ]  # what the samples took, and what is set aside for it
    for took, beside in limits:
        monkeypatch.setattr(subject.limit, "base_bytes", 2**20)
        monkeypatch.setattr(subject.limit, "needed_by", lambda kind, took=took: {"survey": took}[kind])
        kept = 4 * 64**2  # of gradients, which a limit on a CPU counts as well
        least = int((2**20 + LIBRARIES_BYTES + beside + kept + 96**2 * 8) / (1 - SPARE)) + 2
        monkeypatch.setattr(subject.limit, "limit_bytes", least)
        assert 96**2 * 8 <= gram_room(subject, inputs) < 96**2 * 8 + 9
        monkeypatch.setattr(subject.limit, "limit_bytes", least - 3)
        with pytest.raises(MachineError, match=f"calibration takes {least - 1:,} B"):
            gram_room(subject, inputs)


def test_what_is_rounded_at_once_has_one_width_and_fits_beside_the_matrices(tiny_folder):
    subject = subject_for(tiny_folder("llama"))
    wide = [nn.Linear(n, out, device="meta") for n, out in ((64, 32), (96, 8), (64, 48), (64, 32), (96, 8))]
    modules = {str(i): module for i, module in enumerate(wide)}
    spread = replace(subject, modules=modules)
    inputs = [SharedInput((name,), module.in_features) for name, module in modules.items()]
    held = sum(gram_bytes(one.in_features, torch.device("meta")) for one in inputs)
    widest = max(
        rounding_bytes(m.out_features, m.in_features) + moving_bytes([m.out_features], m.in_features)
        for m in wide
    )
    pair = workspace_bytes(80, 64, 2) + 2 * 80 * 64 + moving_bytes([32, 48], 64)

    def groups(limit: int) -> list[list[str]]:
        return [[one.leader for one in group] for group in rounded_together(spread, inputs, limit)]

    assert groups(held + 2**30) == [["0", "2", "3"], ["1", "4"]]
    assert groups(held + pair - widest) == [["0", "2"], ["1"], ["3"], ["4"]]
    assert groups(held) == [["0"], ["1"], ["2"], ["3"], ["4"]]
    on_the_cpu = replace(spread, modules={n: nn.Linear(m.in_features, 8) for n, m in modules.items()})
    assert len(rounded_together(on_the_cpu, inputs, 2**40)) == 5


def test_without_a_memory_limit_matrices_and_records_get_a_quarter_of_what_is_free(tiny_folder, monkeypatch):
    subject = subject_for(tiny_folder("llama"))
    inputs = [SharedInput(("model.layers.0.mlp.down_proj",), 96)]  # 64 outputs
    rounding = rounding_bytes(64, 96) + moving_bytes([64], 96)
    for free, matrices in (
        (4 * rounding, rounding),
        (rounding + 5, 5),  # what rounding leaves
        (rounding - 5, 0),
        (2**50, room.MOST_MEMORY),
    ):
        with_gradients = free + 4 * 64**2  # of which the matrix takes its part
        monkeypatch.setattr(room, "free_memory", lambda _, free=with_gradients: free)
        assert gram_room(subject, inputs) == matrices
        monkeypatch.setattr(room, "free_memory", lambda _, free=free: free)
        assert room.record_room(subject) == min(free // 4, room.MOST_RECORDED)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# Cut before it is hashed, its hash is wrong; cut while it is, its header is. Never while it is mapped: to
# read what is gone of a mapped file ends a process.
CUTS = {
    "join_codes": lambda path, sources: (join_codes(path, sources), cut(path))[0],
    "open_codes": lambda path: (cut(path), open_codes(path))[1],
}


@pytest.mark.slow
@pytest.mark.parametrize("step", CUTS)
@pytest.mark.usefixtures("quick_rounding")
def test_a_joined_file_that_was_cut_is_not_named_and_joined_anew(step, tiny_folder, tmp_path, monkeypatch):
    subject = subject_for(tiny_folder("llama"))
    work = work_in(tmp_path, subject, "llama")
    with monkeypatch.context() as sabotage:
        sabotage.setattr(calibration, step, CUTS[step])
        with pytest.raises(ManifestError):
            calibrate_model(work)
    assert RunFolder(tmp_path).scan.codes is None
    monkeypatch.setattr(calibration, "_finish", lambda *_: pytest.fail("a unit was done again"))
    calibrate_model(work)
    rows = RunFolder(tmp_path).units("calibration")
    with open_codes(tmp_path / FILE_NAME) as file:
        assert file.layers == set(rows["layer"][rows["why"] == ""])
    assert not list((tmp_path / "units").glob("*.safetensors"))


def test_a_linear_runs_where_its_weight_is_or_where_it_is_streamed_to(tiny_folder):
    subject = subject_for(tiny_folder("llama"))
    name = next(iter(subject.modules))
    elsewhere = replace(subject, modules={name: nn.Linear(2, 2, device="meta")})
    assert elsewhere.device_of(name) == torch.device("meta")
    streamed = replace(elsewhere, reference=replace(subject.reference, target=torch.device("cpu")))
    assert streamed.device_of(name) == torch.device("cpu")


def test_each_matrix_lies_where_its_linear_runs(tiny_folder):
    subject = subject_for(tiny_folder("llama"))
    here, there = list(subject.quantized_modules)[:2]
    spread = replace(subject, modules={here: nn.Linear(8, 4), there: nn.Linear(8, 4, device="meta")})
    grams = Gathering(spread, [SharedInput((here,), 8), SharedInput((there,), 8)]).grams
    assert [grams[name].total.device.type for name in (here, there)] == ["cpu", "meta"]
