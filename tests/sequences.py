"""Tiny encoder-decoders with what stands around their texts: T5 ends them, BART and Florence-2 frame them.

The encoders of Donut, TrOCR and Pix2Struct read an image alone.

`tiny.write_recipe` writes them. Markers, as everywhere in `tests.tiny`, follow the controls.
"""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    Blip2Config,
    Blip2Processor,
    DonutProcessor,
    Florence2Config,
    Florence2Processor,
    MarianConfig,
    Pix2StructConfig,
    Pix2StructProcessor,
    T5Config,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.donut.image_processing_pil_donut import DonutImageProcessorPil
from transformers.models.pix2struct.image_processing_pil_pix2struct import Pix2StructImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

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


def seeing(encoder: dict[str, Any], decoder: dict[str, Any]) -> VisionEncoderDecoderConfig:
    answers = {"is_decoder": True, "add_cross_attention": True, "tie_word_embeddings": False}
    return VisionEncoderDecoderConfig(
        encoder=encoder, decoder={**BART, **decoder, **answers}, decoder_start_token_id=BOS, **IDS
    )


def donut() -> VisionEncoderDecoderConfig:
    """Three stages of Swin, whose widths double: the last is as wide as the decoder."""
    tower = {
        "image_size": [32, 32], "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1],
        "num_heads": [2, 2, 4], "window_size": 2, "mlp_ratio": 2.0,
    }  # fmt: skip
    return seeing({"model_type": "donut-swin", **tower}, {"model_type": "mbart"})


def donut_processor() -> tuple[Any, ...]:
    images = DonutImageProcessorPil(size={"height": 32, "width": 32})
    return (DonutProcessor(images, tokenizer_with("<|bos|> $A <|end|>", ("<s_answer>",))),)


def trocr() -> VisionEncoderDecoderConfig:
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return seeing(
        {"model_type": "vit", **tower, "image_size": 28, "patch_size": 14},
        {"model_type": "trocr", "cross_attention_hidden_size": 64},
    )


def trocr_processor() -> tuple[Any, ...]:
    images = ViTImageProcessorPil(size={"height": 28, "width": 28})
    return (TrOCRProcessor(images, tokenizer_with("<|bos|> $A <|end|>")),)


def pix2struct() -> Pix2StructConfig:
    heads = {"hidden_size": 64, "d_kv": 16, "d_ff": 96}
    tower = {"num_hidden_layers": 2, "num_attention_heads": 4, "patch_embed_hidden_size": 3 * 8 * 8}
    text = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD, **IDS}
    return Pix2StructConfig(
        vision_config={**heads, **tower, "seq_len": 64},
        text_config={**heads, **text},
        decoder_start_token_id=PAD,
        **IDS,
    )


def pix2struct_processor() -> tuple[Any, ...]:
    # 40 x 56 pixels become 3 x 4 patches, and three are padding.
    images = Pix2StructImageProcessorPil(max_patches=15, patch_size={"height": 8, "width": 8})
    return (Pix2StructProcessor(images, tokenizer_with("$A <|end|>")),)


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
    "donut": Recipe("VisionEncoderDecoderModel", donut, donut_processor),
    "trocr": Recipe("VisionEncoderDecoderModel", trocr, trocr_processor),
    "pix2struct": Recipe("Pix2StructForConditionalGeneration", pix2struct, pix2struct_processor),
}
