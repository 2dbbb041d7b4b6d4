"""A conversation in the words of a model's chat template, checked: every text stands in it as it was written.

Templates differ in whether they take content as a list of parts or as a string, and one that is given the
other kind may write Python source or nothing at all. So each way is tried, and what comes out is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qprobe.data.reasons import Refused, shown
from qprobe.records import Part, Role, Turn, Video
from qprobe.system.limits import MEMORY_BYTES, bounded_arithmetic, limited

EVERYBODY: frozenset[Role] = frozenset({"system", "user", "assistant"})
WAYS: tuple[frozenset[Role], ...] = (EVERYBODY, frozenset({"user"}), frozenset())
"""Whose content is a list of parts; that of the others is a string."""
SECONDS = 3.0  # for one conversation; templates take about a millisecond
_SOURCE = re.compile(r"""['"]type['"]: ?['"](?:text|image|video)['"]""")
_ARTICLES = {"image": "an", "video": "a"}  # of what a turn may show
_THOUGHTS = re.compile(r".*</\w+>", re.DOTALL)  # what templates take out of earlier answers


class Template:
    """The chat template of a processor or tokenizer, which has `apply_chat_template`."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokens: dict[str, str | None] = {
            kind: getattr(processor, f"{kind}_token", None) for kind in _ARTICLES
        }
        self._too_much = ""
        # A tokenizer by itself has a template for strings.
        self._ways = WAYS if hasattr(processor, "tokenizer") else WAYS[::-1]

    def prompt(self, turns: Sequence[Turn]) -> str:
        """All turns and the head of the next answer. Raises Refused as `fitting` does."""
        return self.fitting(turns, True)[1]

    def fitting(self, turns: Sequence[Turn], answer_next: bool) -> tuple[frozenset[Role], str]:
        """The first of `WAYS` that keeps all texts, and what it gives.

        Raises Refused, with the reason of each way of writing content.
        """
        reasons: list[str] = []
        for way in self._ways:
            try:
                text = self.written(turns, way, answer_next)
                self.check(text, turns)
                return way, text
            except Refused as reason:
                reasons.append(f"given {_kind(way)} {reason}")
        raise Refused(f"the model's chat template does not take it: {'; '.join(reasons)}")

    def written(self, turns: Sequence[Turn], way: frozenset[Role], answer_next: bool) -> str:
        """The text of `turns`. Raises Refused, a clause behind "given ...", if the template fails."""
        if self._too_much:  # once is enough
            raise Refused(self._too_much)
        messages = [{"role": x.role, "content": self._content(x, x.role in way)} for x in turns]
        try:
            with bounded_arithmetic(), limited(SECONDS):
                text = self._processor.apply_chat_template(
                    messages, add_generation_prompt=answer_next, tokenize=False
                )
        except (TimeoutError, MemoryError) as error:
            self._too_much = "it takes more than " + (
                f"{SECONDS:g} s" if isinstance(error, TimeoutError) else f"{MEMORY_BYTES // 2**20:,} MiB"
            )
            raise Refused(self._too_much) from None
        except Exception as error:  # templates raise what they like: jinja2's errors, TypeError, KeyError
            raise Refused(f"it fails ({shown(str(error), 120) or type(error).__name__})") from None
        assert isinstance(text, str), "tokenize=False gives text"
        return text

    def check(self, text: str, turns: Sequence[Turn]) -> None:
        """Raises Refused unless every part of `turns` stands in `text`, in order and as written.

        Up to outer white space, which templates trim; of an answer before the last turn what stands behind
        its thoughts is enough.
        """
        own = sum(len(_SOURCE.findall(x.text)) for x in turns)
        if len(_SOURCE.findall(text)) > own:
            raise Refused("it writes the list of parts itself, as source code")
        end = 0
        for place, turn in enumerate(turns):
            earlier = turn.role == "assistant" and place < len(turns) - 1
            for part in turn.parts:
                end = self._behind(text, part, end, earlier, place)
        for kind, token in self._tokens.items():
            if token and text.count(token, end):
                raise Refused(f"it shows more {kind}s than there are")

    def _behind(self, text: str, part: Part, start: int, earlier: bool, place: int) -> int:
        """Where `part` of a turn ends in `text`, from `start` on."""
        if not isinstance(part, str):
            kind = _kind_of(part)
            token = self._tokens[kind]
            if not token:
                return start
            found = text.find(token, start)
            if found < 0:
                raise Refused(
                    f"it does not show {_ARTICLES[kind]} {kind} of turn {place + 1} where it stands"
                )
            return found + len(token)
        wanted = part.strip()
        found = text.find(wanted, start)
        if found < 0 and earlier:
            wanted = _THOUGHTS.sub("", wanted, count=1).strip()
            found = text.find(wanted, start) if wanted else -1
        if found < 0:
            raise Refused(f"it leaves out or changes the text of turn {place + 1}")
        return found + len(wanted)

    def _content(self, turn: Turn, in_parts: bool) -> str | list[dict[str, str]]:
        if in_parts:
            return [
                {"type": "text", "text": x} if isinstance(x, str) else {"type": _kind_of(x)}
                for x in turn.parts
            ]
        if not turn.seen:
            return turn.text
        missing = next((x for x in map(_kind_of, turn.seen) if not self._tokens[x]), None)
        if missing:
            raise Refused(f"there is no text that stands for {_ARTICLES[missing]} {missing}")
        return "".join(x if isinstance(x, str) else self._tokens[_kind_of(x)] or "" for x in turn.parts)


def _kind_of(part: Part) -> str:
    return "video" if isinstance(part, Video) else "image"


def _kind(way: frozenset[Role]) -> str:
    if way == EVERYBODY:
        return "parts"
    return "parts from the user alone" if way else "strings"
