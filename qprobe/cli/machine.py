"""`qprobe doctor` and `qprobe models`: what this machine can do, and what qprobe knows by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qprobe.cli import shared

if TYPE_CHECKING:
    from qprobe.models.catalogue import Entry


@shared.command("doctor", short_help="Check whether this machine can do the job.")
def doctor(as_json: bool) -> None:
    """Check whether this machine can do the job, and say what to do about each thing that is wrong.

    Does real 4-bit work through bitsandbytes on every device. Exit code 1 if it is right on none.

    \b
    --json prints: ok, qprobe, python, system, packages [{name, version, wanted, satisfied}], devices
    [{name, title, total_bytes, free_bytes, dtype, four_bit {ok, roundtrip_error, roundtrip_bound,
    matmul_error, error}}], hub {status, detail, logged_in}, problems [{what, advice}].
    """
    from qprobe.doctor import doctor as diagnose

    diagnosis = diagnose()
    if as_json:
        shared.print_json(diagnosis.to_json())
    else:
        from qprobe.report.terminal import doctor_text, terminal_width

        click.echo(doctor_text(diagnosis.to_json(), terminal_width()))
    if not diagnosis.ok:
        raise click.exceptions.Exit(1)


@shared.command("models", short_help="List the models known by a short name.")
def models(as_json: bool) -> None:
    """List the models that qprobe knows by a short name; any other is named by hub id or folder.

    \b
    --json prints: models [{alias, hub_id, architecture, note, published_lists [author]}];
    hub_id is null for a model that comes with qprobe.
    """
    from qprobe.models.catalogue import ENTRIES

    if as_json:
        shared.print_json({"models": [_entry(entry) for entry in ENTRIES]})
        return
    for entry in ENTRIES:
        click.secho(entry.alias, bold=True)
        click.echo("    " + (f"{entry.hub_id} ({entry.note})" if entry.hub_id else entry.note))
    click.echo("\n--model also takes any hub id (owner/name) and any folder with a 16-bit checkpoint.")


def _entry(entry: Entry) -> dict[str, object]:
    return {
        "alias": entry.alias,
        "hub_id": entry.hub_id,
        "architecture": entry.architecture,
        "note": entry.note,
        "published_lists": [published.author for published in entry.published],
    }
