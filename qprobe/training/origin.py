"""What an adapter was trained on: its base, as `finetune` recorded it or as the user says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qprobe import __version__
from qprobe.checkpoint.adapters.lora import Adapter, check_adapter
from qprobe.checkpoint.adapters.record import RECORD, Record, read_record
from qprobe.checkpoint.load import check_model, codes_of, with_dtype
from qprobe.checkpoint.starts.attached import names_as_written, peft_library
from qprobe.errors import ManifestError, RunError
from qprobe.loading.log_filters import quiet_models
from qprobe.loading.skeleton import Skeleton
from qprobe.manifest.read import read_manifest
from qprobe.manifest.records import MadeBy, Manifest, ManifestBudget, unmeasured
from qprobe.options import Base, words_of
from qprobe.registry.precisions import SIXTEEN_BIT
from qprobe.system.wording import is_or_are, named
from qprobe.training.bases import BASE_WEIGHTS, MANIFEST_FILE, base_digest, load_base


@dataclass(frozen=True)
class Origin:
    """The base of an adapter. path: of `manifest`, whose 16-bit type is that of the base.

    model: where its 16-bit weights are; None for the id in the manifest. record: of `finetune`, if it made
    the adapter. scanned_in: the 16-bit type by which the manifest knows its model; None for that of the base.
    """

    path: Path
    manifest: Manifest
    base: Base
    model: str | None
    dtype: str | None
    record: Record | None
    scanned_in: str | None = None

    def skeleton(self, trusts_code: bool) -> Skeleton:
        """Of the model, in the base's 16-bit type. Errors as of `check_model`."""
        written = replace(self.manifest, format=with_dtype(self.manifest.format, self.scanned_in))
        checked = check_model(written, self.model, trusts_code)
        return checked.in_dtype(self.manifest.format.compute_dtype)

    def codes(self) -> Path | None:
        """The file of calibrated weights that the manifest names; None if it names none.

        Raises ManifestError if it is missing or changed.
        """
        return codes_of(self.manifest, self.path.parent)

    def refuse_other_weights(self) -> None:
        """Raises ManifestError where `finetune` saw other weights than `model` holds."""
        if self.record is not None and self.record.spec.get(BASE_WEIGHTS) != base_digest(
            self.manifest, self.model
        ):
            raise ManifestError(
                f"The adapter was trained on other weights of {self.manifest.model.id} than "
                f"{self.model or self.manifest.model.id} holds, of the same shapes. Pass the model that it "
                "was trained on."
            )


def origin_of(
    adapter: Adapter, manifest: Path | None, base: Base | None, model: str | None, dtype: str | None
) -> Origin:
    """The base of `adapter`: as `finetune` recorded it, else as `manifest` and `base` say.

    Raises RunError where neither says, or both do and a run is not finished.
    """
    record = read_record(adapter.folder)
    if record is None:
        return _as_told(adapter, manifest, base or "dynamic", model, dtype)
    if record.status != "finished":
        raise RunError(
            f"The training in {adapter.folder} is not finished. Run qprobe finetune to its end first."
        )
    if manifest is not None or base is not None or dtype is not None:
        raise RunError(
            f"{adapter.folder} records what its adapter was trained on. Leave --manifest, --base and --dtype "
            "out."
        )
    return _as_recorded(adapter.folder, record, model)


def _as_recorded(folder: Path, record: Record, model: str | None) -> Origin:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ManifestError(f"{folder} has no {MANIFEST_FILE}, which belongs to its adapter. Copy it again.")
    written = read_manifest(path)
    if record.fingerprint != written.model.fingerprint:
        raise ManifestError(
            f"The adapter in {folder} was trained on a model with fingerprint "
            f"{record.fingerprint[:16]}, but its manifest is of one with "
            f"{written.model.fingerprint[:16]}. Put the two together that belong together."
        )
    base, known = record.spec.get("base"), record.spec.get("dtype")
    if base not in words_of(Base):
        raise RunError(f"{folder / RECORD} says base {base!r}. Remove the folder and train again.")
    spec = with_dtype(written.format, known)
    there = record.model if record.model is not None and Path(record.model).is_dir() else None
    given, scanned_in = replace(written, format=spec), written.format.compute_dtype
    return Origin(path, given, base, model or there, known, record, scanned_in)


def _as_told(
    adapter: Adapter, manifest: Path | None, base: Base, model: str | None, dtype: str | None
) -> Origin:
    if manifest is None:
        raise RunError(
            f"{adapter.folder} does not say what its adapter was trained on, as qprobe finetune would. Pass "
            "--manifest with the skiplist.json of its base, and --base unless that was dynamic."
        )
    written = read_manifest(manifest)
    given = replace(written, format=with_dtype(written.format, dtype))
    return Origin(manifest, given, base, model, dtype, None, written.format.compute_dtype)


def refuse_experts(merged: Manifest) -> None:
    """Raises ManifestError if `merged` has fused experts in 4-bit, which plain transformers cannot load."""
    packed = [x.name for x in merged.layers if x.is_experts and x.is_four_bit]
    if packed:
        raise ManifestError(
            f"The experts {named(packed)} {is_or_are(len(packed))} in 4-bit, and plain transformers loads no "
            "checkpoint that holds such. Merge with --as 16-bit, or serve the adapter beside its base."
        )


def as_merged(origin: Origin, skeleton: Skeleton) -> Manifest:
    """The manifest of the merged checkpoint in 4-bit: the base's layers, without what was measured of it.

    It names no file of calibrated codes: those of the base are no longer its weights, and new ones lie in the
    checkpoint alone, since in the base's 16-bit model, by which a manifest names its layers, they would be
    half of an adapter.
    """
    given = origin.manifest
    spec = replace(given.format, name=given.format.four_bit_name)
    layers, budget = given.layers, given.budget
    if origin.base == "nf4":
        inventory = skeleton.inventory(spec)
        four_bit = {x.name: x.bytes_4bit for x in inventory.layers if not x.fixed}
        layers = tuple(
            replace(x, precision=spec.name, bytes=four_bit[x.name], reason="standard 4-bit")
            if x.name in four_bit
            else x
            for x in layers
        )
        total = inventory.standard_4bit_bytes
        budget = ManifestBudget("standard 4-bit", total, total, total)
    return replace(
        unmeasured(given),
        model=replace(given.model, fingerprint=skeleton.fingerprint),  # in the base's 16-bit type
        format=spec,
        budget=budget,
        layers=layers,
        skip_modules=tuple(x.name for x in layers if x.precision == SIXTEEN_BIT.name),
        made_by=MadeBy(__version__, "qprobe merge"),
        codes=None,
    )


@quiet_models()
def load_finetuned(
    folder: Path | str,
    model: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(peft model, processor): the adapter that `finetune` wrote to `folder`, on the base it was trained on.

    model: where the 16-bit weights are; None for where `finetune` found them. device, trust_remote_code: as
    of `load_dynamic_4bit`.
    Raises RunError if the folder holds no finished adapter, ManifestError if adapter, manifest and the
    weights behind `model` do not belong together.
    """
    where = Path(folder)
    record = read_record(where)
    if record is None or record.status != "finished":
        raise RunError(f"{where} holds no finished adapter. Run qprobe finetune to its end first.")
    origin = _as_recorded(where, record, model)
    check_adapter(where)
    origin.refuse_other_weights()
    base, processor = load_base(
        origin.path, origin.base, origin.model, device, origin.dtype, trust_remote_code
    )
    with names_as_written():
        return peft_library().PeftModel.from_pretrained(base, str(where)).eval(), processor
