"""Tiny encoder-decoders with what stands around their texts: T5 ends them, BART and Florence-2 frame them.

`tiny.write_recipe` writes them. Markers, as everywhere in `tests.tiny`, follow the controls.
"""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    Blip2Config,
    Blip2Processor,
    Florence2Config,
    Florence2Processor,
    MarianConfig,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.tiny import BOS, END, FIRST_MARKER, IDS, PAD, VOCAB, Recipe, make_tokenizer

SIDE = 64  # pixels: 2 x 2 patches behind strides of 4, 2, 2, 2
IMAGE_TOKENS = 5  # those patches, and their mean
QUERIES = 4  # tokens of an image in BLIP-2
PLACES = ("<loc_1>", "<loc_2>")

BART = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 512,
    "forced_eos_token_id": None,
    **IDS,
}


def tokenizer_with(around: str, markers: tuple[str, ...] = (), **options: Any) -> Any:
    """A tokenizer that writes `around`, such as "<|bos|> $A <|end|>", around each text."""
    made = make_tokenizer(markers, **options)
    made._tokenizer.post_processor = TemplateProcessing(
        single=around, special_tokens=[("<|bos|>", BOS), ("<|end|>", END)]
    )
    made.padding_side = "right"
    return made


def t5() -> T5Config:
    return T5Config(
        vocab_size=VOCAB,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=PAD,
        **IDS,
    )


def bart() -> BartConfig:
    return BartConfig(**BART, decoder_start_token_id=END)


def marian() -> MarianConfig:
    return MarianConfig(**BART, decoder_start_token_id=PAD, decoder_vocab_size=VOCAB)


def florence2() -> Florence2Config:
    vision = {
        "depths": (1, 1, 1, 1),
        "embed_dim": (16, 32, 32, 64),
        "num_heads": (2, 2, 2, 2),
        "num_groups": (2, 2, 2, 2),
        "window_size": 4,
        "projection_dim": 64,
    }
    text = {"model_type": "bart", **BART, "decoder_start_token_id": END}
    return Florence2Config(vision_config=vision, text_config=text, image_token_id=FIRST_MARKER)


def florence2_processor() -> tuple[Any, ...]:
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_seq_length=IMAGE_TOKENS
    )
    tokenizer = tokenizer_with(
        "<|bos|> $A <|end|>", ("<image>", *PLACES), extra_special_tokens={"image_token": "<image>"}
    )
    return (Florence2Processor(images, tokenizer),)


def blip2(text: dict[str, Any]) -> Blip2Config:
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Blip2Config(
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        qformer_config={"vocab_size": VOCAB, **tower, "encoder_hidden_size": 64},
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=FIRST_MARKER,
        image_text_hidden_size=32,
    )


def blip2_opt() -> Blip2Config:
    text = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 512, "word_embed_proj_dim": 64}
    return blip2({"model_type": "opt", **text, **sizes, **IDS})


def blip2_processor(around: str) -> tuple[Any, ...]:
    images = BlipImageProcessorPil(size={"height": 28, "width": 28})
    return (Blip2Processor(images, tokenizer_with(around, ("<image>",)), num_query_tokens=QUERIES),)


RECIPES = {
    "t5": Recipe("T5ForConditionalGeneration", t5, lambda: (tokenizer_with("$A <|end|>"),)),
    "bart": Recipe("BartForConditionalGeneration", bart, lambda: (tokenizer_with("<|bos|> $A <|end|>"),)),
    "marian": Recipe("MarianMTModel", marian, lambda: (tokenizer_with("$A <|end|>"),)),
    "florence2": Recipe("Florence2ForConditionalGeneration", florence2, florence2_processor),
    "blip2_t5": Recipe(
        "Blip2ForConditionalGeneration",
        lambda: blip2({"model_type": "t5", **t5().to_dict()}),
        lambda: blip2_processor("$A <|end|>"),
    ),
    "blip2_opt": Recipe("Blip2ForConditionalGeneration", blip2_opt, lambda: blip2_processor("<|bos|> $A")),
}
