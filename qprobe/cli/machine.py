"""`qprobe doctor` and `qprobe models`: what this machine can do, and what qprobe knows by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qprobe.cli import shared
from qprobe.cli.output.speaking import say

if TYPE_CHECKING:
    from qprobe.models.entry import Entry


@shared.command("doctor", short_help="Check whether this machine can do the job.")
def doctor(as_json: bool) -> None:
    """Check whether this machine can do the job, and say what to do about each thing that is wrong.

    Does real 4-bit work through bitsandbytes on every device. Exit code 1 if it is right on none.

    \b
    --json prints: ok, qprobe, python, system, packages [{name, version, wanted, satisfied}], devices
    [{name, title, total_bytes, free_bytes, dtype, four_bit {ok, roundtrip_error, roundtrip_bound,
    matmul_error, error}}], hub {status, detail, logged_in}, problems [{what, advice}].
    """
    from qprobe.loading.doctor import doctor as diagnose

    diagnosis = diagnose()
    if as_json:
        shared.print_json(diagnosis.to_json())
    else:
        from qprobe.report.terminal import doctor_text, terminal_width

        say(doctor_text(diagnosis.to_json(), terminal_width()))
    if not diagnosis.ok:
        raise click.exceptions.Exit(1)


@shared.command("models", short_help="List the models known by a short name.")
def models(as_json: bool) -> None:
    """List the models that qprobe knows by a short name; any other is named by hub id or folder.

    Sizes are exact; nf4 is standard 4-bit with its quantization state (`qprobe plan` has every layout).
    "gated" weights need their licence accepted on the hub and `hf auth login`; plan needs neither.

    \b
    --json prints: models [{alias, hub_id, architecture, note, access, parameters, parameters_source,
    geometry_source, linear_layers, bytes_16bit, nf4_layers, nf4_parameter_bytes, nf4_total_bytes,
    published_lists [author], published_sizes [{layout, gib, source}]}];
    hub_id is null for a model that comes with qprobe, access is embedded, open or gated.
    """
    from qprobe.models.catalogue import entries

    known = [_entry(entry) for entry in entries()]
    if as_json:
        shared.print_json({"models": known})
        return
    from qprobe.report.sizes import models_text
    from qprobe.report.terminal import terminal_width

    say(models_text(known, terminal_width()))
    say("\n--model also takes any hub id (owner/name) and any folder with a 16-bit checkpoint.")


def _entry(entry: Entry) -> dict[str, object]:
    from qprobe.models.geometry import read_geometry

    geometry = read_geometry(entry.geometry)
    return {
        "alias": entry.alias,
        "hub_id": entry.hub_id,
        "architecture": entry.architecture,
        "note": entry.note,
        "access": "embedded" if entry.hub_id is None else "gated" if entry.is_gated else "open",
        "parameters": geometry.parameters,
        "parameters_source": geometry.parameters_source,
        "geometry_source": geometry.source,
        **vars(geometry.sizes),
        "published_lists": [published.author for published in entry.published],
        "published_sizes": [vars(size) for size in entry.published_sizes],
    }
