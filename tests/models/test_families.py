"""A family of models is one file, found by looking into the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from qprobe.cli import main
from qprobe.models import families
from qprobe.models.catalogue import entries, find
from qprobe.models.family import GENERIC, OTHER, PROJECTOR, VISION, VLLM_FUSED
from qprobe.models.grid import Grid, ImageTensors
from qprobe.models.spellings import spellings
from qprobe.models.towers import group_of, reads_vision, tower_of
from tests.dropped import dropped

DUMMY = '''
    """A family that nobody has."""

    from qprobe.models.entry import OPEN, on_the_hub
    from qprobe.models.family import LANGUAGE, PROJECTOR, VISION, Engine, Family
    from qprobe.models.grid import Grid

    FAMILY = Family(
        architectures=("DummyForConditionalGeneration",),
        towers=((VISION, r"^eye\\\\."), (PROJECTOR, r"^nerve$"), (LANGUAGE, r"^(mouth\\\\.|lm_head$)")),
        vision_inputs=r"\\\\.look$",
        fused=(("a", "b"),),
        image_grid=lambda tensors: Grid(tensors.samples, 5, 7),
        old_names=((r"^eye\\\\.", "camera."),),
        engines={"vllm": Engine({"ab": ("a", "b")}, renames=((r"^mouth\\\\.", "llm."),), dropped="9.9")},
        entries=on_the_hub(
            "DummyForConditionalGeneration", OPEN, ("dummy-1b", "nobody/Dummy-1B", "llava-1.5-7b")
        ),
    )
'''.replace("\\\\", "\\")
ARCHITECTURE = "DummyForConditionalGeneration"


@pytest.fixture
def dummy(tmp_path: Path) -> Iterator[None]:
    caches = (families.families, families.family_of, entries)
    with dropped("qprobe.models.families", "dummy", DUMMY, tmp_path / "dropped", *caches):
        yield


def test_a_family_that_is_dropped_into_the_folder_is_used_everywhere(dummy: None) -> None:
    assert [tower_of(x, ARCHITECTURE, True) for x in ("eye.0", "nerve", "ear")] == [VISION, PROJECTOR, OTHER]
    assert reads_vision("mouth.look", ARCHITECTURE, "language")
    siblings = frozenset({"mouth.a", "mouth.b"})
    assert group_of("mouth.a", siblings, ARCHITECTURE, "language") == "mouth.{a,b}"
    assert spellings("eye.0", "eye.0", ARCHITECTURE).all == ("eye.0", "camera.0")
    assert families.engine_of("vllm", ARCHITECTURE).dropped == "9.9"
    tensors = ImageTensors(samples=3, thw=None, pixels=None, patch=None, merge=None)
    assert families.family_of(ARCHITECTURE).image_grid(tensors) == Grid(3, 5, 7)


def test_its_models_are_listed_and_found(dummy: None) -> None:
    entry = find("nobody/dummy-1b")
    assert entry is not None and entry.alias == "dummy-1b"
    listed = json.loads(CliRunner().invoke(main, ["models", "--json"]).stdout)["models"]
    assert [x["hub_id"] for x in listed if x["alias"] == "dummy-1b"] == ["nobody/Dummy-1B"]
    assert "dummy-1b" in CliRunner().invoke(main, ["models"]).stdout


def test_without_its_file_it_is_an_architecture_like_any_unknown_one() -> None:
    assert families.family_of(ARCHITECTURE) is GENERIC
    assert find("dummy-1b") is None and tower_of("eye.0", ARCHITECTURE, True) == OTHER
    assert families.engine_of("vllm", ARCHITECTURE).fused == VLLM_FUSED


def test_no_architecture_is_listed_twice() -> None:
    listed = [name for family in families.families() for name in family.architectures]
    assert len(set(listed)) == len(listed) > 10
    for family in families.families():
        assert {entry.architecture for entry in family.entries} <= set(family.architectures)
