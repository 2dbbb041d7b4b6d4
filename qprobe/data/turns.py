"""--turns: which answers of a conversation count, and the samples that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qprobe.data.conversation import Conversation
from qprobe.data.images import file_bytes
from qprobe.data.reasons import Refused
from qprobe.data.videos import frames_of
from qprobe.options import Turns
from qprobe.records import Part, Sample, Turn, Video


def counting(conversation: Conversation, which: Turns) -> tuple[int, ...]:
    """Places of the answers that count, in order; none where the conversation has no answer.

    Raises Refused if it has answers and none is to be learned.
    """
    answers = [i for i, x in enumerate(conversation.turns) if x.role == "assistant"]
    learned = [i for i in answers if conversation.turns[i].learned]
    if answers and not learned:
        raise Refused("all of its answers have the weight 0")
    chosen = {"first": learned[:1], "last": learned[-1:], "each": learned}[which]
    return tuple(chosen)


def learning(conversation: Conversation, which: Turns) -> Conversation:
    """The conversation with only those answers to learn that count. Raises Refused if there is none."""
    places = counting(conversation, which)
    if not places:
        raise Refused("its last turn is the user's, so there is no answer to learn")
    turns = tuple(
        replace(x, learned=i in places) if x.role == "assistant" else x
        for i, x in enumerate(conversation.turns)
    )
    return replace(conversation, turns=turns)


def samples_of(conversation: Conversation, which: Turns) -> tuple[Sample, ...]:
    """A sample per answer that counts: all turns before it, and the answer.

    A conversation without any is one sample, whose answer the reference gives. Raises Refused if no answer
    is to be learned or an image is gone.
    """
    turns = held(conversation.turns)
    places = counting(conversation, which) or (len(turns),)
    alone = len(places) == 1
    return tuple(
        Sample(
            conversation.name if alone else f"{conversation.name} turn {place + 1}",
            turns[:place],
            turns[place].text if place < len(turns) else None,
        )
        for place in places
    )


def held(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """`turns` with the bytes of their images and of all frames. Raises Refused if a file is gone."""
    return tuple(replace(turn, parts=tuple(map(_held, turn.parts))) for turn in turns)


def _held(part: Part) -> Part:
    if isinstance(part, Video):
        frames = [x if isinstance(x, bytes) else file_bytes(x) for x in part.frames]
        return Video(frames_of(frames[0]) if part.is_file else tuple(frames))
    return part if isinstance(part, str | bytes) else file_bytes(part)
