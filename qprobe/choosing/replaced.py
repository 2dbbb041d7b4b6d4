"""What a new skip-list takes the place of: a list that a scan measured is set aside, never lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qprobe.atomic import write_atomic
from qprobe.errors import ManifestError
from qprobe.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Replaced:
    """The list that stood in the file before. kept_as: its copy, where a scan had measured it."""

    manifest: Manifest
    kept_as: Path | None

    @property
    def sentence(self) -> str:
        """What was replaced, and where it is now."""
        made, kl = self.manifest.made_by.command, self.manifest.quality.kl_dynamic
        what = f"the list of `{made}`" + ("" if kl is None else f" (measured KL {kl:.3g})")
        if self.kept_as is None:
            return f"Replaces {what}; that command makes it again."
        return f"Replaces {what}, which is kept as {self.kept_as}."


def set_aside(target: Path) -> Replaced | None:
    """Copies what a scan measured from `target` to NAME-measured.json beside it, before it is replaced.

    None where `target` holds no manifest. Raises ManifestError if the copy cannot be written.
    """
    try:
        manifest = read_manifest(target)
    except ManifestError:
        return None
    if not manifest.compared:  # chosen from predictions, or by hand: nothing was spent on it
        return Replaced(manifest, None)
    copy = target.with_name(f"{target.stem}-measured{target.suffix}")
    try:
        write_atomic(copy, target.read_bytes())
    except OSError as error:
        raise ManifestError(
            f"{target} was measured and would be replaced, but its copy {copy} cannot be written "
            f"({error.strerror}). Pass another --out."
        ) from error
    return Replaced(manifest, copy)
