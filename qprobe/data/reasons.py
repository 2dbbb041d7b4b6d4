"""Why something that people brought is not used, in words that are safe to print."""

from __future__ import annotations

LONGEST = 80  # characters of somebody else's text that a sentence repeats


class Refused(ValueError):
    """A row or an image that is left out; the message is the reason, without a full stop."""


def shown(text: str, longest: int = LONGEST) -> str:
    """`text` on one line, without control characters and at most `longest` characters of it."""
    line = " ".join(text.split())
    printable = "".join(
        x if x.isprintable() else x.encode("unicode_escape").decode() for x in line[: longest + 1]
    )
    return printable if len(line) <= longest else f"{printable[:longest]}..."


def checked_text(text: str, what: str) -> str:
    """`text`, which `what` names. Raises Refused if it holds half of a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"{what} holds half of a character ({text[error.start]!a})") from None
    return text
