"""The comparison's numbers against slow oracles, its contract, and what it refuses."""

import gc
import json
import math
import weakref
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest

from qprobe.checkpoint.comparing import compare as compare_module
from qprobe.checkpoint.comparing import course as course_module
from qprobe.checkpoint.comparing.rows import Comparison
from qprobe.checkpoint.load import dynamic_4bit, load_dynamic_4bit, load_standard_4bit, standard_4bit
from qprobe.checkpoint.storage import stored_bytes
from qprobe.data.builtin import Samples
from qprobe.errors import ManifestError, QprobeError, SampleError
from qprobe.loading.reference import load_reference, reference_of
from qprobe.manifest.read import read_manifest
from qprobe.manifest.write import write_manifest
from qprobe.options import CompareOptions, Progress, no_progress
from qprobe.records import Fact
from qprobe.report.comparison import read_comparison
from qprobe.runs import derived
from qprobe.runs.access import write_file
from qprobe.runs.folder import RunFolder
from qprobe.runs.key import SampleKey
from qprobe.runs.statistics import ratio
from tests import tiny
from tests.checkpoint import reference
from tests.checkpoint.manifests import every_third, manifest_for
from tests.reading import answered
from tests.runs.runs import four_layers, key_of, spec_of

pytestmark = pytest.mark.slow


def compare(asked: CompareOptions, progress: Progress = no_progress) -> Comparison:
    return compare_module.compare(**{**vars(asked), "progress": progress})


@pytest.fixture
def written(tiny_folder, tmp_path):
    """written(name, kept): options that compare the tiny model under a manifest that keeps `kept`."""

    def write(name, kept=None, **options):
        folder = tiny_folder(name)
        path = tmp_path / "skiplist.json"
        write_manifest(path, manifest_for(folder, every_third(folder) if kept is None else kept))
        return CompareOptions(path, model=str(folder), device="cpu", max_new_tokens=6, **options)

    return write


@pytest.fixture
def use_samples(monkeypatch):
    """use_samples(samples): what compare takes instead of the built-in ones."""

    def use(samples, skipped=()):
        monkeypatch.setattr(course_module, "choose_samples", lambda *_: Samples(tuple(samples), skipped))

    return use


# One sample per batch: in bf16 the padding of a batch moves logits by a rounding step, which the oracle,
# that runs samples alone, does not share.
@pytest.mark.parametrize("name", ["mllama", "qwen2_5_vl", "llama"])
def test_rows_equal_the_slow_oracle(name, written, use_samples, tiny_folder):
    options = written(name, batch_size=1)
    given = tiny.questions(name, 3)
    given[1] = replace(given[1], answer="the red bar, by two units")  # one of them brings its answer
    use_samples(given)
    result = compare(options)
    rows = {row.name: row for row in result.rows}
    assert list(rows) == ["16-bit", "nf4", "dynamic"]

    original = load_reference(str(tiny_folder(name)), "cpu")
    own = answered(original.model, original.processor, given, 6, 1)
    teacher = [mine if theirs.answer is None else theirs for mine, theirs in zip(own, given, strict=True)]
    models = {
        "16-bit": original.model,
        "nf4": load_standard_4bit(str(tiny_folder(name)), device="cpu")[0],
        "dynamic": load_dynamic_4bit(options.manifest, options.model, "cpu")[0],
    }
    logits = {
        key: [reference.answer_logits(model, original.processor, sample) for sample in teacher]
        for key, model in models.items()
    }
    for key, row in rows.items():
        answers = [s.answer for s in answered(models[key], original.processor, given, 6, 1)]
        assert [sample.answers[key] for sample in result.samples] == answers
        same = [mine == theirs.answer for mine, theirs in zip(answers, own, strict=True)]
        assert row.answer_agreement == sum(same) / 3
        expected = reference.mean_kl(logits["16-bit"], logits[key])
        assert row.kl == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert row.top1_agreement == reference.top1_agreement(logits["16-bit"], logits[key])
        assert row.total_bytes == stored_bytes(models[key]).total_bytes
    assert rows["16-bit"].kl == 0 and rows["nf4"].kl > 0 and rows["nf4"].kl_se > 0


@pytest.mark.parametrize("name", tiny.GENERATING_NAMES)
def test_every_architecture_goes_through_in_batches(name, written, use_samples):
    options = written(name, batch_size=2)
    use_samples(tiny.questions(name, 3))
    steps = []
    result = compare(options, lambda stage, done, total: steps.append((stage, done, total)))
    assert [s.id for s in result.samples] == ["question-0", "question-1", "question-2"]
    sizes = [row.total_bytes for row in result.rows]
    assert sizes[0] > sizes[2] > sizes[1]
    assert result.metrics == ()
    for stage in ("16-bit", "nf4", "dynamic"):
        done = [d for s, d, _ in steps if s == stage]
        assert done == sorted(done) and done[-1] == 6
    assert {total for _, _, total in steps} == {6}


def test_a_dynamic_model_that_keeps_everything_is_the_16bit_model(written, use_samples, tiny_folder):
    layers = manifest_for(tiny_folder("llama")).layers
    use_samples(tiny.questions("llama", 3))
    _, standard, dynamic = compare(written("llama", [x.name for x in layers])).rows
    assert (dynamic.kl, dynamic.kl_se, dynamic.top1_agreement, dynamic.answer_agreement) == (0, 0, 1, 1)
    assert standard.kl > 0.01


def test_the_json_is_the_contract(written, use_samples):
    use_samples(tiny.questions("llama", 1), skipped=("b.txt: skipped, it is no image",))
    result = compare(written("llama"))
    data = json.loads(json.dumps(result.to_json()))
    assert list(data) == ["rows", "metrics", "samples"]
    keys = "name parameter_bytes total_bytes kl kl_se top1_agreement answer_agreement".split()
    assert [list(row) for row in data["rows"]] == [keys] * 3
    assert all(row["kl_se"] is None for row in data["rows"]) and data["metrics"] == []  # one sample, no facts
    assert [list(sample) for sample in data["samples"]] == [["id", "prompt", "answers"]]
    assert list(data["samples"][0]["answers"]) == ["16-bit", "nf4", "dynamic"]
    assert result.notes == ("b.txt: skipped, it is no image",)


def test_facts_are_counted_over_all_samples(written, use_samples, tiny_folder):
    # Three facts, two of them words of the 16-bit model's own answer: 2 / 3, not the mean of 1 / 2 and 1.
    original = load_reference(str(tiny_folder("llama_tied")), "cpu")
    given = tiny.questions("llama_tied", 2)
    first, second = (s.answer or "" for s in answered(original.model, original.processor, given, 6, 1))
    facts = ((Fact("a", first), Fact("b", "submarine")), (Fact("c", second),))
    assert first.strip() and second.strip() and "submarine" not in first
    use_samples([replace(s, facts=f) for s, f in zip(given, facts, strict=True)])
    (metric,) = compare(written("llama_tied", batch_size=1)).metrics
    assert metric.name == "facts" and metric.means["16-bit"].value == 2 / 3


def test_a_metric_is_of_every_models_answers_with_errors_paired_by_sample(written, use_samples):
    given = tiny.questions("llama", 4)
    use_samples(given)
    result = compare(written("llama", batch_size=1, metric=characters))
    (metric,) = result.metrics
    assert (metric.name, metric.is_share, metric.samples, metric.left_out) == ("characters", False, 4, 0)
    counts = {name: [len(s.answers[name]) for s in result.samples] for name in metric.means}
    assert list(counts) == ["16-bit", "nf4", "dynamic"]
    for name, found in counts.items():
        assert metric.means[name].value == pytest.approx(sum(found) / 4)
    pairs = [(x.model, x.against) for x in metric.differences]
    assert pairs == [("nf4", "16-bit"), ("dynamic", "16-bit"), ("dynamic", "nf4")]
    for x in metric.differences:
        gaps = [a - b for a, b in zip(counts[x.model], counts[x.against], strict=True)]
        mean = sum(gaps) / 4
        assert x.value == pytest.approx(mean)
        # The error of a mean of 4: sqrt(sum((gap - mean)^2) / 3 / 4), not that of two independent means.
        assert x.se == pytest.approx(math.sqrt(sum((g - mean) ** 2 for g in gaps) / 12))


def characters(sample, answer):
    assert sample.answer is None  # none of them brings an answer, whatever the models said
    return len(answer)


def test_only_samples_with_a_given_answer_count(written, use_samples, tiny_folder):
    original = load_reference(str(tiny_folder("llama")), "cpu")
    given = tiny.questions("llama", 3)
    own = answered(original.model, original.processor, given, 6, 1)
    given[0], given[1] = (
        replace(given[0], answer=f" {own[0].answer}\n"),
        replace(given[1], answer="submarine"),
    )
    use_samples(given)
    result = compare(written("llama", batch_size=1, metric="exact"))
    (metric,) = result.metrics
    assert (metric.samples, metric.left_out, metric.means["16-bit"].value) == (2, 1, 0.5)
    assert result.notes == ("exact: 1 of 3 samples does not count, without a given answer (question-2).",)


def test_a_metric_that_fails_names_the_sample_before_another_model_is_run(written, use_samples, monkeypatch):
    def broken(sample, answer):
        return {"question-0": 1.0}[sample.id]

    monkeypatch.setattr(compare_module, "standard_4bit", lambda *_: pytest.fail("loaded"))
    use_samples(tiny.questions("llama", 2))
    with pytest.raises(
        QprobeError, match=r"metric broken raised KeyError \('question-1'\) on sample question-1"
    ):
        compare(written("llama", metric=broken))
    with pytest.raises(QprobeError, match=r"'bleu' is no metric\. Pass one of exact, contains, facts"):
        compare(written("llama", metric="bleu"))


def test_one_model_at_a_time(written, use_samples, monkeypatch):
    alive: list[weakref.ref] = []

    def watched(load, model_of):
        def wrapper(*args, **named):
            gc.collect()
            assert [ref for ref in alive if ref() is not None] == []
            loaded = load(*args, **named)
            alive.append(weakref.ref(model_of(loaded)))
            return loaded

        return wrapper

    monkeypatch.setattr(compare_module, "reference_of", watched(reference_of, lambda x: x.model))
    for name, load in (("standard_4bit", standard_4bit), ("dynamic_4bit", dynamic_4bit)):
        monkeypatch.setattr(compare_module, name, watched(load, lambda x: x))
    use_samples(tiny.questions("llama", 1))
    compare(written("llama"))
    assert len(alive) == 3


def test_the_revision_of_the_manifest_is_the_one_that_is_compared(
    written, use_samples, tiny_folder, monkeypatch
):
    # A stand-in for a model on the hub: its skeleton says which revision the manifest asks for.
    asked = []
    check = compare_module.check_model

    def at_revision(*args):
        skeleton = check(*args)
        return replace(skeleton, source=replace(skeleton.source, revision="abc"))

    def load(skeleton, device, **named):
        asked.append(("16-bit", skeleton.source.revision))
        return reference_of(skeleton, device, **named)

    def load_nf4(skeleton, spec, device, codes):
        asked.append(("nf4", skeleton.source.revision))
        return standard_4bit(skeleton, spec, device, codes)

    monkeypatch.setattr(compare_module, "check_model", at_revision)
    monkeypatch.setattr(compare_module, "reference_of", load)
    monkeypatch.setattr(compare_module, "standard_4bit", load_nf4)
    use_samples(tiny.questions("llama", 1))
    compare(written("llama"))
    assert asked == [("16-bit", "abc"), ("nf4", "abc")]


def test_a_model_without_a_language_head_is_told_so(written):
    with pytest.raises(QprobeError, match=r"BertModel.*no language head"):
        compare(written("bert"))


def test_another_model_is_refused(written, tiny_folder):
    options = replace(written("llama"), model=str(tiny_folder("llama_tied")))
    with pytest.raises(ManifestError, match="was written for llama"):
        compare(options)


def test_samples_that_the_processor_refuses_are_named_before_a_model_is_loaded(written, monkeypatch):
    monkeypatch.setattr(
        "qprobe.checkpoint.comparing.compare.reference_of", lambda *_: pytest.fail("a model was loaded")
    )
    rows = [{"prompt": "<|image_pad|> what is it?", "answer": "a cat"}]
    with pytest.raises(SampleError, match="stands for an image in this model"):
        compare(written("qwen2_vl", data=rows))


def test_images_of_the_user_are_compared_on(written, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(tiny.picture(number))
    (folder / "notes.txt").write_text("no image")
    result = compare(written("qwen2_vl", images=folder, prompt="what is it?", samples=2))
    assert [(s.id, s.prompt) for s in result.samples] == [("0.png", "what is it?"), ("1.png", "what is it?")]


def test_ratio_and_its_error_by_hand():
    # values 1, 2 over counts 1, 3: ratio 3/4; residuals 1/4 and -1/4; se^2 = 2/1 * (2/16) / 4^2 = 1/64.
    mean, error = ratio([1.0, 2.0], [1, 3])
    assert mean == 0.75 and error == pytest.approx(math.sqrt(Fraction(1, 64)))
    assert ratio([1.0, 0.0, 2.0], [1, 0, 3]) == (mean, error)  # a sample without answer tokens says nothing
    assert ratio([1.0], [4]) == (0.25, None)
    assert ratio([0.0], [0]) == (None, None)


def test_samples_that_chose_the_list_are_noted(tmp_path):
    samples = tiny.questions("llama", 3)
    measured, held_out = (SampleKey(x.id, x.digest, x.ends) for x in samples[:2])
    spec = spec_of(calibration=((measured,),), held_out=((held_out,),))
    assert compare_module.seen_note(samples, tmp_path) == ()  # no run folder
    RunFolder(tmp_path).open(key_of(four_layers(), spec=spec))
    (note,) = compare_module.seen_note(samples, tmp_path)
    assert note.startswith("2 of 3 samples took part in the scan that chose the list, which flatters it.")
    assert compare_module.seen_note(samples[2:], tmp_path) == ()


def test_the_result_stays_in_the_run_folder_of_the_manifest(written, use_samples, monkeypatch):
    options = written("llama")
    folder = options.manifest.parent
    use_samples(tiny.questions("llama", 2))
    result = compare(options)
    assert not (folder / "compare.json").exists()  # no run folder
    (folder / "scan.json").write_text("{}")
    assert compare(options) == result
    kept = read_comparison(RunFolder(folder))
    assert kept.pop("skip_modules") == list(read_manifest(options.manifest).skip_modules)
    assert kept == result.to_json()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(derived, "write_file", partial(write_file, how=full))
    (note,) = compare(options).notes
    assert "No space left" in note
