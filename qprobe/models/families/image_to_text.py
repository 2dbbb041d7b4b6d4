"""Encoders of one image ahead of a decoder that answers: Donut, TrOCR and Nougat, Pix2Struct and its kin."""

from __future__ import annotations

from qprobe.models.family import LANGUAGE, PROJECTOR, VISION, Family

FAMILY = Family(
    architectures=("VisionEncoderDecoderModel", "Pix2StructForConditionalGeneration"),
    towers=(
        (VISION, r"^encoder\."),
        (PROJECTOR, r"^enc_to_dec_proj$"),
        (LANGUAGE, r"^decoder\."),
    ),
    vision_inputs=r"(encoder_attn\.(k|v)_proj|encoder_decoder_attention\.attention\.(key|value)|"
    r"crossattention\.self\.(key|value))$",
)
