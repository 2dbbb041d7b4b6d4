"""The scores of our benchmark of rankings: weight and activation error, mlx-lm's, brute force, the default.

mlx-lm's score is the gradient at the quantized model times D. It and the default are taken once more with
calibrated weights in place, since what is left to repair is another thing then.
"""

from __future__ import annotations

from collections.abc import Callable

from qprobe.measure.attribution import walking
from tests.benchmarks.peers.passages import batches_of
from tests.benchmarks.peers.workers.exchange import hand_back_lists, measured, read_job
from tests.benchmarks.peers.workers.ours import calibrated, put, subject_and_samples
from tests.benchmarks.rankings import additive
from tests.benchmarks.rankings.lists import Chooser, Lists
from tests.benchmarks.rankings.measured import Measured

MLX, DEFAULT = "mlx-lm's gradient", "qprobe"


def main() -> None:
    """Choose by every score and hand back."""
    job = read_job()
    subject, samples = subject_and_samples(job)
    path, batches = subject.path, batches_of(subject, samples)
    chooser = Chooser(subject.inventory)

    def give(name: str, choose: Callable[[], Lists]) -> None:
        with measured(job.device) as cost:
            lists = choose()
            found = {str(share): sorted(lists(share) or ()) for share in job.options["shares"]}
        hand_back_lists(job, name, found, cost, "bitsandbytes")

    def end_to_end(suffix: str) -> None:
        give(MLX + suffix, lambda: chooser.lists(additive.slope_scores(path, batches, 1.0)))
        give(DEFAULT + suffix, lambda: chooser.damage_lists(additive.default_damage(path, batches)))

    give("weight error", lambda: chooser.lists(additive.weight_error(subject)))
    own = [subject.encode(group) for group in subject.groups(tuple(samples), 8)]
    give(
        "activation error",
        lambda: chooser.lists(
            additive.output_nmse(additive.output_errors(subject, own, propagated=False), "activation")
        ),
    )
    with walking(path):
        end_to_end("")
        if job.options["brute_force"]:
            few = Measured(subject, batches[: job.options["brute_force"]])
            give("brute force", lambda: chooser.lists(additive.brute_force(few, lambda done, of: None)))
    if "nf4-calibrated" in job.options["placed"]:
        put(subject, calibrated(subject, batches))
        with walking(path):
            end_to_end(", on calibrated weights")


if __name__ == "__main__":
    main()
