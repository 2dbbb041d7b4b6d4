"""Rows in the shapes that people have, and the turns that each of them means."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import pathname2url

from qprobe.data.images import in_memory, png
from tests import tiny

A, B = tiny.picture(0), tiny.picture(1)
AB = tiny.animation(0, 1)
QUESTION, ANSWER = "What is it?", "A cat."
ONE = [("user", [A, QUESTION]), ("assistant", [ANSWER])]
TEXT = [("user", [QUESTION]), ("assistant", [ANSWER])]


class Shape(NamedTuple):
    """row: of the folder that a.png, b.png and ab.gif, an animation, lie in. turns: (role, texts and bytes of
    images, of videos those of all frames) each.

    notes: what is told of it, behind the name of its source.
    """

    name: str
    row: Callable[[Path], dict[str, Any]]
    turns: list[tuple[str, list[str | bytes | tuple[bytes, ...]]]]
    notes: tuple[str, ...] = ()


def files(folder: Path) -> Path:
    (folder / "a.png").write_bytes(A)
    (folder / "b.png").write_bytes(B)
    (folder / "ab.gif").write_bytes(AB)
    return folder


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def messages(content: Any, answer: Any = ANSWER, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def sharegpt(value: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": ANSWER}]
    return {"conversations": turns, **more}


def part(**source: Any) -> list[dict[str, Any]]:
    return [source, {"type": "text", "text": QUESTION}]


def asked(**more: Any) -> dict[str, Any]:
    return {"prompt": QUESTION, "answer": ANSWER, **more}


def plain(name: str, row: dict[str, Any], turns: list = ONE, *notes: str) -> Shape:
    return Shape(name, lambda _: row, turns, notes)


DESCRIBE = "Describe this image in detail."
DESCRIBED = [("user", [A, DESCRIBE]), ("assistant", [ANSWER])]
ASKED_TO_DESCRIBE = f'in 1 line the question is "{DESCRIBE}", since there is an answer alone.'
CHOSEN = "in 1 line chosen is read as the answer, and rejected is not used."
JOINED = "in 1 line turns of the user that follow one another, with an image between, are read as one."
LISTED = "in 1 line the choices stand below the question, each behind its letter."
LETTER = "in 1 line the answer's number, counted from 0, became the letter of its choice."
CHOICE = "in 1 line the answer's number is one of the choices, and is not read as the place of another."
LAST = "in 1 line a last question without an answer is left out."
MOVING = [("user", [(A, B), QUESTION]), TEXT[1]]
ANIMATED = [("user", [tuple(png(in_memory(x).image) for x in tiny.frames(0, 1)), QUESTION]), TEXT[1]]
SAID = [{"role": "assistant", "content": ANSWER}]
SYSTEM = ("system", ["Be short."])
SHAPES = (
    # messages
    plain("messages", messages(QUESTION), TEXT),
    plain("messages with text parts", messages([{"type": "text", "text": QUESTION}]), TEXT),
    plain("messages with an answer in parts", messages(QUESTION, [{"type": "text", "text": ANSWER}]), TEXT),
    plain("messages with a system turn", {
        "messages": [{"role": "system", "content": "Be short."}, *messages(QUESTION)["messages"]]
    }, [SYSTEM, *TEXT]),
    plain("messages with an image beside", messages(QUESTION, image="a.png")),
    plain("messages with a list of images beside", messages(QUESTION, images=["a.png"])),
    plain("messages with images as a string", messages(QUESTION, images="a.png")),
    plain("messages with a mark", messages(f"<image>{QUESTION}", images=["a.png"])),
    plain("messages with a mark on its own line", messages(f"<image>\n{QUESTION}", images=["a.png"])),
    plain("messages with images of none", messages(QUESTION, images=None), TEXT),
    plain("messages with no images", messages(QUESTION, images=[]), TEXT),
    plain("messages with an image without a name", messages(QUESTION, image="", images=[""]), TEXT),
    plain("messages with a record of nulls for an image", messages(
        QUESTION, image={"bytes": None, "path": None}, images=[{"bytes": None, "path": None}]
    ), TEXT),
    plain("a part that names its image", messages(part(type="image", image="a.png"))),
    plain("a part with a path", messages(part(type="image", path="a.png"))),
    plain("a part with a url of a file", messages(part(type="image", url="a.png"))),
    plain("a part whose image is beside", messages(part(type="image"), images=["a.png"])),
    plain("a part whose empty keys are null", messages([
        {"type": "image", "text": None, "index": 0}, {"type": "text", "text": QUESTION, "index": None}
    ], images=["a.png"])),
    plain("parts without types", messages([{"image": "a.png"}, {"text": QUESTION}])),
    plain("the image inside and beside", messages(part(type="image", image="a.png"), images=["a.png"])),
    plain("image_url with data", messages(part(
        type="image_url", image_url={"url": f"data:image/png;base64,{in_base64(A)}", "detail": "low"}
    ))),
    plain("image_url as a string", messages(part(type="image_url", image_url="a.png"))),
    plain("input_image and input_text", messages([
        {"type": "input_image", "image_url": f"data:image/png;base64,{in_base64(A)}"},
        {"type": "input_text", "text": QUESTION},
    ])),
    plain("two images before the text", messages([
        {"type": "image", "image": "a.png"}, *part(type="image", image="b.png")
    ]), [("user", [A, B, QUESTION]), TEXT[1]]),
    plain("an image between two texts", messages([
        {"type": "text", "text": "First read."}, {"type": "image", "image": "a.png"},
        {"type": "text", "text": QUESTION},
    ]), [("user", ["First read.", A, QUESTION]), TEXT[1]]),
    plain("a mark between two words", messages("The logo <image> or b?", images=["a.png"]),
          [("user", ["The logo ", A, " or b?"]), TEXT[1]]),
    plain("an image behind the text", messages(f"{QUESTION}\n<image>", images=["a.png"]),
          [("user", [QUESTION, A]), TEXT[1]]),
    plain("images by their numbers", messages([
        {"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": QUESTION}
    ], images=["a.png", "b.png"]), [("user", [B, A, QUESTION]), TEXT[1]]),
    plain("an image alone", messages("<image>", images=["a.png"]), [("user", [A]), TEXT[1]]),
    plain("images in two turns", {"messages": [
        *messages(f"<image>{QUESTION}")["messages"], *messages("<image>And here?")["messages"]
    ], "images": ["a.png", "b.png"]}, [*ONE, ("user", [B, "And here?"]), TEXT[1]]),
    # conversations
    plain("conversations", sharegpt(QUESTION), TEXT),
    plain("conversations with an image", sharegpt(f"<image>\n{QUESTION}", image="a.png")),
    plain("conversations without a mark", sharegpt(QUESTION, image="a.png")),
    plain("conversations with a list of one", sharegpt(QUESTION, image=["a.png"])),
    plain("conversations with two marks", sharegpt(f"<image>\n<image>\n{QUESTION}", image=["a.png", "b.png"]),
          [("user", [A, B, QUESTION]), TEXT[1]]),
    plain("conversations with a system column", sharegpt(QUESTION, system="Be short."), [SYSTEM, *TEXT]),
    plain("conversations of a system", {"conversations": [
        {"from": "system", "value": "Be short."}, *sharegpt(QUESTION)["conversations"]
    ]}, [SYSTEM, *TEXT]),
    plain("turns in both spellings, one of them null", {"conversations": [
        {"role": None, "from": "human", "content": None, "value": QUESTION},
        {"role": "assistant", "from": None, "content": ANSWER, "value": None},
    ]}, TEXT),
    plain("an img tag", sharegpt(f"Picture 1: <img>a.png</img>\n{QUESTION}"),
          [("user", ["Picture 1: ", A, f"\n{QUESTION}"]), TEXT[1]]),
    # prompt and answer
    plain("prompt and answer", asked(), TEXT),
    plain("prompt, answer and image", asked(image="a.png")),
    plain("question and answers", {
        "question": QUESTION, "answers": ["A dog.", ANSWER, ANSWER], "image": "a.png"
    }),
    plain("the first of equally frequent answers", asked(answer=[ANSWER, "A dog."]), TEXT),
    plain("answers of VQA", {"question": QUESTION, "answers": [
        {"answer": "a dog", "answer_id": 1}, {"answer": ANSWER, "answer_id": 2}, {"answer": ANSWER}
    ]}, TEXT),
    plain("a number for an answer", asked(answer=7), [TEXT[0], ("assistant", ["7"])]),
    plain("a fraction for an answer", asked(answer=0.5), [TEXT[0], ("assistant", ["0.5"])]),
    plain("numbers for answers", asked(answer=[3, 7, 7]), [TEXT[0], ("assistant", ["7"])]),
    plain("prompt and completion", {"prompt": QUESTION, "completion": ANSWER}, TEXT),
    plain("prompt and completion in turns", {
        "prompt": messages(QUESTION)["messages"][:1], "completion": messages("")["messages"][1:],
        "images": ["a.png"],
    }),
    plain("a prompt in turns", {
        "prompt": [{"role": "system", "content": "Be short."}, *messages(QUESTION)["messages"][:1]],
        "answer": ANSWER,
    }, [SYSTEM, *TEXT]),
    plain("a prompt with a system column", asked(system="Be short."), [SYSTEM, *TEXT]),
    plain("an empty answer that is null", {"prompt": QUESTION, "answers": None, "answer": ANSWER}, TEXT),
    # other names of columns
    plain("query and response", {"query": QUESTION, "response": ANSWER, "images": ["a.png"]}),
    plain("an instruction", {"instruction": QUESTION, "output": ANSWER}, TEXT),
    plain("an instruction with an empty input", {
        "instruction": QUESTION, "input": "", "output": ANSWER, "images": ["a.png"]
    }),
    plain("an instruction with its input", {"instruction": QUESTION, "input": "Look.", "output": ANSWER},
          [("user", [f"{QUESTION}\nLook."]), TEXT[1]]),
    plain("an instruction with a mark and a system prompt", {
        "instruction": f"<image>{QUESTION}", "input": "", "output": ANSWER, "images": ["a.png"],
        "system": "Be short.",
    }, [SYSTEM, *ONE]),
    plain("an input alone", {"instruction": "", "input": QUESTION, "output": ANSWER}, TEXT),
    plain("a pair of texts", {"images": ["a.png"], "texts": [{"user": QUESTION, "assistant": ANSWER}]}),
    plain("several pairs of texts", {"images": ["a.png"], "texts": [
        {"user": QUESTION, "assistant": ANSWER, "source": None}, {"user": "And?", "assistant": "A dial."}
    ]}, [*ONE, ("user", ["And?"]), ("assistant", ["A dial."])], "not used are the fields texts[].source."),
    plain("a caption", {"image": "a.png", "caption": ANSWER}, DESCRIBED, ASKED_TO_DESCRIBE),
    plain("captions", {"image": "a.png", "captions": [ANSWER, "A dog."]}, DESCRIBED, ASKED_TO_DESCRIBE),
    plain("a caption beside a question", asked(image="a.png", caption="A room."), ONE,
          "not used are the fields caption."),
    plain("the choice of most in VQA", {
        "question": QUESTION, "multiple_choice_answer": ANSWER, "image": "a.png",
        "answers": [{"answer": "a dog", "answer_id": 1}, {"answer": "a dog", "answer_id": 2}],
    }),
    plain("a preference", {"prompt": QUESTION, "chosen": ANSWER, "rejected": "A dog."}, TEXT, CHOSEN),
    plain("a preference on an image", {
        "question": QUESTION, "chosen": ANSWER, "rejected": "A dog.", "image": "a.png"
    }, ONE, CHOSEN),
    plain("a preference in turns", {
        "prompt": messages(QUESTION)["messages"][:1], "chosen": SAID, "rejected": SAID, "images": ["a.png"]
    }, ONE, CHOSEN),
    plain("a preference whose turns repeat the question", {
        "prompt": QUESTION, "chosen": messages(QUESTION)["messages"], "rejected": SAID
    }, TEXT, CHOSEN),
    plain("a preference of whole conversations", {
        "chosen": messages(QUESTION)["messages"], "rejected": messages(QUESTION, "A dog.")["messages"]
    }, TEXT, CHOSEN),
    plain("a preference behind a conversation", {
        "conversations": sharegpt(QUESTION)["conversations"][:1], "chosen": {"from": "gpt", "value": ANSWER},
        "rejected": {"from": "gpt", "value": "A dog."}, "image": "a.png",
    }, ONE, CHOSEN),
    plain("a question behind the last answer", {
        "messages": [*messages(QUESTION)["messages"], {"role": "user", "content": "<image>And here?"}],
        "images": ["a.png"],
    }, TEXT, LAST),
    # where other tools put things
    plain("an image as Anthropic has it", messages([
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": in_base64(A)}},
        {"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}},
    ])),
    plain("a system prompt in parts", {
        "system": [{"type": "text", "text": "Be short."}], **messages(QUESTION)
    }, [SYSTEM, *TEXT]),
    plain("a turn of the developer", {
        "messages": [{"role": "developer", "content": "Be short."}, *messages(QUESTION)["messages"]]
    }, [SYSTEM, *TEXT]),
    plain("an image beside the content of its turn", {"messages": [
        {"role": "user", "content": QUESTION, "images": [in_base64(A)]}, *SAID
    ]}),
    plain("marks for the images beside the content", {"messages": [
        {"role": "user", "content": f"<image>{QUESTION}<image>", "images": ["a.png", "b.png"]}, *SAID
    ]}, [("user", [A, QUESTION, B]), TEXT[1]]),
    plain("a question and its image in two turns", {"messages": [
        {"role": "user", "content": QUESTION},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}, *SAID,
    ]}, [("user", [QUESTION, A]), TEXT[1]], JOINED),
    plain("a conversation", {"conversation": messages(QUESTION)["messages"], "turn": 1}, TEXT,
          "not used are the fields turn."),
    plain("a prompt that repeats the question", {"prompt": QUESTION, **messages(QUESTION)}, TEXT),
    plain("a prompt that repeats the question, in a preference", {
        "prompt": QUESTION, "chosen": messages(QUESTION)["messages"], "rejected": SAID, **messages(QUESTION)
    }, TEXT, CHOSEN),
    plain("a history", {
        "query": QUESTION, "response": ANSWER, "history": [["Who?", "Me."], ["And?", "You."]]
    }, [("user", ["Who?"]), ("assistant", ["Me."]), ("user", ["And?"]), ("assistant", ["You."]), *TEXT]),
    plain("numbered marks", {
        "question": f"<image 2> or <image 1>? {QUESTION}", "answer": ANSWER, "image_1": "a.png",
        "image_2": "b.png", "image_3": None,
    }, [("user", [B, "or ", A, f"? {QUESTION}"]), TEXT[1]]),
    plain("numbered marks for a list", messages(f"<image_1>{QUESTION}<image_2>", images=["a.png", "b.png"]),
          [("user", [A, QUESTION, B]), TEXT[1]]),
    plain("a label beside a question", {"query": QUESTION, "label": [ANSWER], "image": "a.png"}),
    plain("a link to the image", asked(image="a.png", flickr_url="https://x.org/1.jpg"), ONE,
          "not used are the fields flickr_url."),
    plain("a file name", asked(file_name="a.png")),
    # videos
    plain("the frames of a video", asked(video=["a.png", "b.png"]), MOVING),
    plain("two videos", asked(videos=[["a.png", "b.png"], ["b.png"]]),
          [("user", [(A, B), (B,), QUESTION]), TEXT[1]]),
    plain("frames of two videos in one field", asked(video=[["a.png", "b.png"], ["b.png"]]),
          [("user", [(A, B), (B,), QUESTION]), TEXT[1]]),
    plain("a mark of a video", messages(f"{QUESTION}<video>", videos=[["a.png", "b.png"]], video_id="v1"),
          [("user", [QUESTION, (A, B)]), TEXT[1]], "not used are the fields video_id."),
    plain("a part with frames", messages(part(type="video", video=["a.png", "b.png"])), MOVING),
    plain("a part whose frames stand beside", messages(part(type="video"), video=["a.png", "b.png"]), MOVING),
    plain("an animated image as a video", asked(video="ab.gif"), ANIMATED),
    plain("a list of animated images", asked(videos=["ab.gif"]), ANIMATED),
    plain("an animated image in base64", asked(video={"bytes": None, "path": None, "data": in_base64(AB)}),
          ANIMATED),
    Shape("an address of a video", lambda folder: messages(part(
        type="video_url", video_url={"url": f"file://{pathname2url(str(folder / 'ab.gif'))}"}
    )), ANIMATED),
    # choices
    plain("choices and the number of one", {"question": QUESTION, "choices": ["a cat", "a dog"], "answer": 1},
          [("user", [f"{QUESTION}\nA. a cat\nB. a dog"]), ("assistant", ["B"])], LETTER, LISTED),
    plain("options and a letter", {
        "question": QUESTION, "options": "['a cat', \"a dog's\"]", "answer": "A", "image": "a.png"
    }, [("user", [A, f"{QUESTION}\nA. a cat\nB. a dog's"]), ("assistant", ["A"])], LISTED),
    plain("options and a number as text", {"question": QUESTION, "options": ["2", "4"], "answer": "0"},
          [("user", [f"{QUESTION}\nA. 2\nB. 4"]), ("assistant", ["A"])], LETTER, LISTED),
    plain("options of numbers and one of them", {"question": QUESTION, "options": [1, 0], "answer": 1},
          [("user", [f"{QUESTION}\nA. 1\nB. 0"]), ("assistant", ["1"])], CHOICE, LISTED),
    plain("options of numbers and one that is no place", {
        "question": QUESTION, "options": [1, 2], "answer": 2
    }, [("user", [f"{QUESTION}\nA. 1\nB. 2"]), ("assistant", ["2"])], LISTED),
    plain("options of numbers and one in its own place", {
        "question": QUESTION, "options": ["0", "1"], "answer": "1"
    }, [("user", [f"{QUESTION}\nA. 0\nB. 1"]), ("assistant", ["1"])], LISTED),
    plain("choices by their letters", {
        "question": QUESTION, "A": "a cat", "B": "a dog", "C": None, "answer": "B"
    }, [("user", [f"{QUESTION}\nA. a cat\nB. a dog"]), ("assistant", ["B"])], LISTED),
    plain("choices that the question lists", {
        "question": f"{QUESTION} A) cat B) dog", "choices": ["cat", "dog"], "answer": "B"
    }, [("user", [f"{QUESTION} A) cat B) dog"]), ("assistant", ["B"])]),
    plain("no choices", {"question": QUESTION, "options": "[]", "answer": ANSWER}, TEXT),
    plain("image_path", asked(image_path="a.png")),
    plain("img", asked(img="a.png")),
    plain("numbered images", asked(image_1="a.png", image_2="b.png", image_3=None),
          [("user", [A, B, QUESTION]), TEXT[1]]),
    plain("an image in base64", asked(image=in_base64(A))),
    plain("an image as datasets stores it", asked(image={"path": "a.png", "bytes": None})),
    Shape("an address", lambda folder: asked(image=f"file://{pathname2url(str(folder / 'a.png'))}"), ONE),
    Shape("a whole path", lambda folder: asked(image=str(folder / "a.png")), ONE),
)  # fmt: skip
