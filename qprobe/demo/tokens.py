"""The demo's tokenizer, chat template and processor, as standard transformers files.

A word with the space before it is one token, a digit is a token of its own (so that a reading is
predicted digit by digit), and words outside the scenes fall back to characters.
"""

from __future__ import annotations

import re
import string
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import MllamaImageProcessor, MllamaProcessor, PreTrainedTokenizerFast

from qprobe.demo.draw import SIZE
from qprobe.demo.scenes import STYLES

IMAGE = "<|image|>"
BEGIN, END, PAD, UNKNOWN = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|unknown|>"
HEADER_START, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
SPACE = "\u2581"  # stands for the space before a word, as in SentencePiece
_PIECE = Regex(rf"\n+|{SPACE}?[0-9]|{SPACE}?[a-zA-Z]+|{SPACE}?[^\sa-zA-Z0-9{SPACE}]|{SPACE}")

# Llama 3.2's template without its system preamble (knowledge date, tools): the demo has neither.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for content in message['content'] %}"
    "{%- if content['type'] == 'image' %}{{- '<|image|>' }}"
    "{%- elif content['type'] == 'text' %}{{- content['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)


def _pieces(text: str) -> list[str]:
    spaced = text.replace(" ", SPACE)
    return re.findall(rf"{SPACE}?[0-9]|{SPACE}?[a-zA-Z]+|{SPACE}?[^\sa-zA-Z0-9{SPACE}]", spaced)


def vocabulary() -> list[str]:
    """Every token in the order of its id; the image token is last, just outside `vocab_size`."""
    special = [PAD, BEGIN, END, HEADER_START, HEADER_END, UNKNOWN]
    characters = sorted(set(string.printable) - set(string.whitespace))
    words = {"user", "assistant", "system"}
    for style in STYLES:
        words.update(_pieces(style.prompt))
        words.update(piece for part in style.parts for text in part.texts for piece in _pieces(text))
    words.update(SPACE + digit for digit in string.digits)
    known = [*special, "\n", "\n\n", SPACE, *characters]
    return [*known, *sorted(words - set(known)), IMAGE]


def _tokenizer() -> PreTrainedTokenizerFast:
    tokens = vocabulary()
    ids = {token: number for number, token in enumerate(tokens)}
    # WordPiece with an empty prefix takes the longest known piece: a word, or else its characters.
    model = WordPiece(ids, unk_token=UNKNOWN, continuing_subword_prefix="")  # pyright: ignore[reportCallIssue]
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)  # pyright: ignore[reportAttributeAccessIssue]
    split: Any = pre_tokenizers.Split(_PIECE, "isolated")
    tokenizer.pre_tokenizer = split
    decoder: Any = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    tokenizer.decoder = decoder
    special = [PAD, BEGIN, END, HEADER_START, HEADER_END, UNKNOWN, IMAGE]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def processor() -> MllamaProcessor:
    """The demo's processor: one tile of SIZE x SIZE pixels, mean and deviation 0.5."""
    image_processor = MllamaImageProcessor(
        size={"height": SIZE, "width": SIZE},
        max_image_tiles=1,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return MllamaProcessor(image_processor, _tokenizer(), chat_template=CHAT_TEMPLATE)


def chat(prompt: str) -> list[dict[str, Any]]:
    """One user message with an image and a prompt, as `apply_chat_template` takes it."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
