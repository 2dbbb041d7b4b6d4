"""Checkpoints go to the hub whole; they load, are audited and compared by their hub id, from the cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from qprobe.checkpoint import hub
from qprobe.checkpoint.auditing.audit import audit
from qprobe.checkpoint.comparing.compare import compare
from qprobe.checkpoint.load import load_dynamic_4bit
from qprobe.checkpoint.quantize import quantize
from qprobe.errors import ModelError
from qprobe.manifest.write import write_manifest
from tests.checkpoint.manifests import every_third, manifest_for

REPO = "somebody/tiny-dynamic"


class StandIn:
    """A hub of folders, `HfApi` and `snapshot_download` in one; what was fetched is cached."""

    def __init__(self, root: Path) -> None:
        self.root, self.cached, self.private = root, set[str](), {}

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private.setdefault(repo_id, private)

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> Any:
        assert repo_id in self.private, "no such repository"
        shutil.copytree(folder_path, self.root / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/0")

    def snapshot_download(self, repo_id: str, ignore_patterns: list[str], local_files_only: bool) -> str:
        assert "*.py" in ignore_patterns  # no code of others comes here
        if not local_files_only:
            self.cached.add(repo_id)
        if repo_id not in self.cached:
            raise LocalEntryNotFoundError("not cached")
        return str(self.root / repo_id)


@pytest.fixture(scope="module")
def pushed(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[StandIn, Any, Path]:
    """(the hub, what `quantize` said, the folder it wrote) of the tiny Llama."""
    work, folder = tmp_path_factory.mktemp("hub"), tiny_folder("llama")
    write_manifest(work / "skiplist.json", manifest_for(folder, every_third(folder)))
    there = StandIn(work / "there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "HfApi", lambda: there)
        done = quantize(work / "skiplist.json", work / "out", str(folder), "cpu", push_to_hub=REPO)
    return there, done, work / "out"


@pytest.fixture
def there(pushed: tuple[StandIn, Any, Path], monkeypatch: pytest.MonkeyPatch) -> StandIn:
    pushed[0].cached.clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pushed[0].snapshot_download)
    return pushed[0]


@pytest.mark.slow
def test_a_checkpoint_is_pushed_whole_with_manifest_and_card_and_private(pushed: tuple[StandIn, Any, Path]):
    stand_in, done, out = pushed
    assert done.pushed == f"https://hub/{REPO}/commit/0" and done.to_json()["pushed"] == done.pushed
    sent = {x.name: x.read_bytes() for x in (stand_in.root / REPO).iterdir()}
    assert sent == {x.name: x.read_bytes() for x in out.iterdir()}
    assert {"skiplist.json", "README.md", "config.json"} <= sent.keys() and stand_in.private == {REPO: True}


@pytest.mark.slow
def test_a_hub_id_loads_from_the_cache_and_is_fetched_only_if_that_is_allowed(
    pushed: tuple[StandIn, Any, Path], there: StandIn
):
    with pytest.raises(ModelError, match=rf"{REPO} is no folder here, and the hub's cache holds no files"):
        load_dynamic_4bit(REPO, device="cpu")
    model, _ = load_dynamic_4bit(REPO, device="cpu", allow_downloads=True)
    again, _ = load_dynamic_4bit(REPO, device="cpu")  # cached now
    local, _ = load_dynamic_4bit(pushed[2], device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = local(ids).logits
        assert torch.equal(model(ids).logits, wanted) and torch.equal(again(ids).logits, wanted)


@pytest.mark.slow
def test_audit_and_compare_take_a_hub_id_or_a_folder_with_a_manifest(
    pushed: tuple[StandIn, Any, Path], there: StandIn, tiny_folder: Any
):
    there.cached.add(REPO)
    found = audit(REPO, REPO)
    assert found.ok and found.layers == audit(pushed[2], pushed[2] / "skiplist.json").layers
    rows = [{"prompt": "what?", "answer": "a cat"}]
    asked = {"model": str(tiny_folder("llama")), "data": rows, "device": "cpu", "max_new_tokens": 2}
    by_id, by_file = (compare(x, **asked) for x in (REPO, pushed[2] / "skiplist.json"))
    assert by_id.rows == by_file.rows


def test_what_holds_no_manifest_or_is_no_name_is_one_sentence(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no skiplist\.json"):
        hub.manifest_in(tmp_path)
    assert hub.manifest_in(tmp_path / "no" / "skiplist.json") == tmp_path / "no" / "skiplist.json"
    with pytest.raises(ModelError, match=r"'a b' is no name on the hub"):
        quantize(tmp_path / "skiplist.json", tmp_path / "out", push_to_hub="a b")
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses_leaves_the_checkpoint_and_says_where_it_is(tmp_path: Path):
    class Refusing:
        def create_repo(self, *_args: Any, **_kwargs: Any) -> None:
            raise OSError("401: not logged in")

    with pytest.raises(
        ModelError, match=rf"cannot be written: 401: not logged in {tmp_path} holds the whole"
    ):
        hub.push(tmp_path, REPO, Refusing())


def test_what_is_pushed_is_private_where_it_is_new_and_its_address_comes_back(tmp_path: Path):
    there = StandIn(tmp_path / "there")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "skiplist.json").write_text("{}")
    assert hub.push(tmp_path / "out", REPO, there) == f"https://hub/{REPO}/commit/0"
    assert there.private == {REPO: True} and (tmp_path / "there" / REPO / "skiplist.json").is_file()
    with pytest.raises(ModelError, match="'no-owner' is no name on the hub"):
        hub.push(tmp_path / "out", "no-owner", there)


def test_what_is_here_is_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_named: pytest.fail("fetched"))
    (tmp_path / "somebody" / "here").mkdir(parents=True)
    for here in ("somebody/here", "somebody/skiplist.json", str(tmp_path / "gone"), "gone"):
        assert hub.fetched(here, allow_downloads=True) == Path(here)
    (tmp_path / "somebody" / "here" / "skiplist.json").write_text("{}")
    assert hub.manifest_in("somebody/here") == Path("somebody/here/skiplist.json")


def test_files_that_cannot_be_had_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refusing(error: Exception) -> None:
        def download(*_args: Any, **_named: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    refusing(LocalEntryNotFoundError("not cached"))
    with pytest.raises(ModelError, match=r"Pass --allow-downloads to fetch them, or check the path"):
        hub.fetched("somebody/else")
    with pytest.raises(ModelError, match=r"of somebody/else cannot be had: not cached Check the name"):
        hub.fetched("somebody/else", allow_downloads=True)
    refusing(OSError("first line\nsecond line"))
    with pytest.raises(ModelError, match=r"cannot be had: first line Check the name"):
        hub.fetched("somebody/else")


def test_nothing_is_fetched_unless_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = StandIn(tmp_path)
    (tmp_path / REPO).mkdir(parents=True)
    (tmp_path / REPO / "skiplist.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", there.snapshot_download)
    for look in (hub.fetched, hub.manifest_in):
        with pytest.raises(ModelError, match="Pass --allow-downloads"):
            look(REPO)
    assert hub.manifest_in(REPO, allow_downloads=True) == tmp_path / REPO / "skiplist.json"
    assert hub.manifest_in(REPO) == tmp_path / REPO / "skiplist.json"  # from the cache
