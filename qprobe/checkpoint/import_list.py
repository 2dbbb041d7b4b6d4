"""`qprobe import`: somebody else's skip-list as a manifest, so that it can be compared with ours."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qprobe import __version__
from qprobe.errors import ManifestError
from qprobe.exports.lists import Matched, match_list, read_list, remarks
from qprobe.loading.skeleton import Skeleton, skeleton_of
from qprobe.loading.source import known, resolve
from qprobe.manifest.records import MadeBy, Manifest, ManifestBudget, ManifestLayer, Quality
from qprobe.records import FormatSpec, Inventory, ModelIdentity
from qprobe.registry.precisions import SIXTEEN_BIT, Precision


@dataclass(frozen=True)
class Imported:
    """The manifest, and what matched what. rule: whose reading of the list was used, in words.

    notes: sentences a reader must see. fixed: layers that stay in 16-bit whatever the list says.
    """

    manifest: Manifest
    rule: str
    matched: tuple[Matched, ...]
    notes: tuple[str, ...]
    fixed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `import --json`, without the manifest."""
        return {
            "rule": self.rule,
            "matched": [asdict(x) for x in self.matched],
            "dead": [x.entry for x in self.matched if not x.layers],
            "layers_16bit": list(self.manifest.skip_modules),
            "total_bytes": self.manifest.budget.total_bytes,
            "notes": list(self.notes),
        }


def import_list(
    path: Path | str, model: str, out: Path | str | None = None, trust_remote_code: bool = False
) -> Imported:
    """The list in the file `path` as a manifest for `model` (alias, hub id or folder).

    path: a config.json with a quantization_config (of bitsandbytes, compressed-tensors, ModelOpt, GPTQModel,
    AutoRound or AWQ), what `export` wrote as JSON, YAML or Python, or a plain JSON list of names. An entry
    may use today's names or those of the files on the hub, and is read by its tool's rule, or that of the
    transformers that the config names, today's for a plain list, which is taken to be for NF4 with double
    quantization. The output head and tied weights stay in 16-bit, as they always do here. out: where the
    manifest goes, for its record of the command. trust_remote_code: as of `qprobe.load_dynamic_4bit`.
    Raises ManifestError for a file without a list, one for FP4, or a list of which no entry matches the
    model.
    """
    file = Path(path)
    published = read_list(file)
    spec = published.format
    skeleton = skeleton_of(resolve(model, trust_remote_code), spec.compute_dtype, known(model))
    inventory = skeleton.inventory(spec)
    matched = match_list(published.entries or (), inventory, published.language, skeleton.architecture)
    if matched and not any(x.layers for x in matched):
        raise ManifestError(
            f"None of the {len(matched)} entries of {file} matches a layer of {skeleton.source.id}, first "
            f"{matched[0].entry!r}; pass the model that the list was made for."
        )
    kept = frozenset(name for one in matched for name in one.layers)
    words = ["qprobe", "import", file.name, "--model", skeleton.source.id]
    command = shlex.join([*words, *(["--out", Path(out).name] if out is not None else [])])
    fixed = tuple(x.name for x in inventory.layers if x.fixed)
    notes = (*published.notes, *remarks(published, matched, inventory, kept))
    made = _manifest(skeleton, spec, inventory, kept, matched, command)
    return Imported(made, published.language.label, matched, notes, fixed)


def _manifest(
    skeleton: Skeleton,
    spec: FormatSpec,
    inventory: Inventory,
    kept: frozenset[str],
    matched: Sequence[Matched],
    command: str,
) -> Manifest:
    four_bit = spec.precision.stored
    by_entry = {name: one.entry for one in reversed(matched) for name in one.layers}
    layers = tuple(
        ManifestLayer(
            name=x.name,
            checkpoint_name=x.checkpoint_name,
            shape=x.shape,
            precision=SIXTEEN_BIT.name if x.fixed or x.name in kept else four_bit.name,
            bytes=x.bytes_16bit if x.fixed or x.name in kept else x.bytes_4bit,
            sensitivity_kl=None,
            reason=_reason(x.fixed, by_entry.get(x.name), four_bit),
        )
        for x in inventory.layers
    )
    total, standard = inventory.total_bytes(kept), inventory.standard_4bit_bytes
    source = skeleton.source
    return Manifest(
        model=ModelIdentity(
            source.id,
            getattr(skeleton.config, "_commit_hash", None),
            skeleton.architecture,
            skeleton.fingerprint,
        ),
        format=spec,
        budget=ManifestBudget("imported", max(total, standard), total, standard),
        quality=Quality(),
        layers=layers,
        uncovered=inventory.uncovered,
        skip_modules=tuple(x.name for x in layers if x.precision == SIXTEEN_BIT.name),
        made_by=MadeBy(__version__, command),
    )


def _reason(fixed: str | None, entry: str | None, four_bit: Precision) -> str:
    if fixed is not None:
        return f"{fixed}: stays in 16-bit"
    return four_bit.title if entry is None else f"kept by the imported entry {entry!r}"
