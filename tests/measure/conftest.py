"""Loaded tiny models under measurement, in float32 so that oracles agree to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qprobe.data.builtin import photographs
from qprobe.loading.reference import load_reference
from qprobe.measure.subject import Subject, subject_of
from qprobe.records import FormatSpec, Sample, asked
from tests.reading import answered

WITH_IMAGES = ("mllama", "qwen2_vl", "qwen2_5_vl", "llava_pixtral")
WITH_HEAD = (*WITH_IMAGES, "llama", "llama_tied")
ALL = (*WITH_HEAD, "bert")


class Case(NamedTuple):
    """A model under measurement and three samples with answers (without, if it has no language head)."""

    subject: Subject
    samples: tuple[Sample, ...]


@pytest.fixture(scope="session")
def case(tiny_folder: Callable[[str], Path]) -> Callable[[str], Case]:
    """Factory of cases by tiny name; each is made once and kept in float32."""
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            reference = load_reference(str(tiny_folder(name)), "cpu")
            reference.model.float()
            samples = _samples(name)
            if name in WITH_HEAD:
                samples = answered(reference.model, reference.processor, samples, 5, 4)
            made[name] = Case(subject_of(reference, FormatSpec()), tuple(samples))
        return made[name]

    return make


def _samples(name: str) -> list[Sample]:
    if name in WITH_IMAGES:
        return list(photographs("what is this?", limit=3).samples)
    return [
        Sample(f"text-{i}", asked(text))
        for i, text in enumerate(("a red bag", "name the unit", "which one is it"))
    ]
