"""What is said of other samples, of a metric, and of samples that are fewer than were asked for."""

import pandas as pd

from qprobe.manifest.records import NEAREST, NOTHING
from qprobe.records import Score
from qprobe.runs.scored import scored
from qprobe.selection.decide import Candidate
from qprobe.selection.verdict import DYNAMIC, fewer_measured, metric_verdict, others_verdict


def measured(name: str, *kl: float) -> Candidate:
    rows = {"sample": [str(i) for i in range(len(kl))], "answer_tokens": [1] * len(kl), "kl_sum": list(kl)}
    return Candidate(name, frozenset(), 0, pd.DataFrame(rows))


def test_the_sentence_names_each_model_once():
    plain = [measured(NOTHING, 0.2, 0.4), measured(DYNAMIC, 0.1, 0.1)]
    assert others_verdict("x.jsonl", plain) == (
        "On 2 samples of another kind (x.jsonl) standard 4-bit costs 0.30 ± 0.10 and this list leaves "
        "0.1 ± 0 nats per answer token."
    )
    calibrated = [measured(NEAREST, 0.2), measured(NOTHING, 0.1)]
    said = "standard 4-bit costs 0.2 (error unknown) and calibrated 4-bit 0.1 (error unknown)"
    assert said in others_verdict("x.jsonl", calibrated)


def ones(*values: float) -> list[Score]:
    return [Score(v, 1) for v in values]


def test_the_verdict_tells_the_paired_differences_and_where_none_is_found():
    # dynamic - nf4: 1, 1, 1, 0, 0 of 5: 0.6, se^2 = 5/4 * (3 * 0.16 + 2 * 0.36) / 25 = 0.06, se 0.245
    models = {"16-bit": ones(1, 1, 1, 1, 1), "nf4": ones(0, 0, 0, 1, 1), "dynamic": ones(1, 1, 1, 1, 1)}
    assert metric_verdict(scored("exact", True, models)) == (
        "By exact on 5 held-out samples: 16-bit 100.0 %, standard 4-bit 40.0 %, this list 100.0 %; "
        "this list +60.0 ± 24.5 points against standard 4-bit and 0.0 ± 0.0 points "
        "(no difference found) against 16-bit."
    )


def test_the_verdict_where_nothing_is_kept_and_of_calibrated_weights():
    two = scored("score", False, {"16-bit": ones(3), "nf4-calibrated": ones(2.5)})
    assert metric_verdict(two) == (
        "By score on 1 held-out sample: 16-bit 3, calibrated 4-bit 2.5; calibrated 4-bit "
        "-0.5 (error unknown) against 16-bit."
    )


def test_fewer_than_were_asked_for_is_said() -> None:
    assert fewer_measured(3, 0, 3) == fewer_measured(3, 1, None) == ()
    said = "Of the 8 samples asked for,"
    assert fewer_measured(1, 0, 8) == (f"{said} 1 was measured: no other was usable.",)
    assert fewer_measured(7, 1, 8) == (f"{said} 7 were measured: 1 got no answer.",)
    assert fewer_measured(5, 2, 8) == (f"{said} 5 were measured: 2 got no answer, no other was usable.",)
