"""Images behind addresses, where --allow-downloads says that they may be fetched."""

from __future__ import annotations

import http.client
from urllib.request import Request, urlopen

from qprobe.data.reasons import Refused, shown

_SECONDS = 30  # without an answer
_PART = 2**20  # bytes


def download(address: str, limit: int) -> bytes:
    """What lies at an http(s) address. Raises Refused if it cannot be had or is larger than `limit` bytes."""
    try:
        with urlopen(Request(address, headers={"User-Agent": "qprobe"}), timeout=_SECONDS) as answer:
            data = bytearray()  # in parts: a read sets aside all that it is asked for
            while len(data) <= limit and (part := answer.read(min(_PART, limit + 1 - len(data)))):
                data += part
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Refused(f"its image at {shown(address)} cannot be fetched ({shown(str(reason))})") from None
    if len(data) > limit:
        raise Refused(f"its image at {shown(address)} is larger than {limit // 2**20:,} MiB")
    return bytes(data)
