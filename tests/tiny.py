"""Tiny random-weight models of the architectures qprobe must handle, written as complete model folders.

Nothing is downloaded: configs, weights (bf16 safetensors), tokenizers, image processors and chat templates
are made here, the same on every run. The widths are small but the shapes are awkward on purpose: GQA,
in_features that are no multiple of 64, tied embeddings, fused qkv, gates, and in "bert" weights whose
number of elements is no multiple of the 4-bit blocksize.
"""

from __future__ import annotations

import io
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    MistralConfig,
    MllamaConfig,
    MllamaProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qprobe.records import Sample, asked

VOCAB = 384
CONTROLS = ("<unk>", "<|bos|>", "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
UNK, BOS, PAD, END = 0, 1, 2, 3

# Every model's image markers take their ids after the controls, in this order.
QWEN_MARKERS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PIXTRAL_MARKERS = ("[IMG]",)
FIRST_MARKER = len(CONTROLS)

CORPUS = (
    "what does the image show? describe the picture in one sentence. a row of teeth, an arrow at the "
    "third tooth, impacted at thirty degrees. the needle of the dial reads forty two; there is a crack at"
    " bolt hole number seven. a blue cotton shirt of medium size, a red leather bag. two lines cross at "
    "the point (3, 5) where the green line rises and the orange line falls. which one is larger, the left"
    " bar or the right bar? please answer with the name of the colour, the number and the unit. coastal "
    "scene with a train, a cat, a rocket, a cup of coffee, an astronaut and the surface of the moon."
)


class Recipe(NamedTuple):
    """How one tiny model is made: its transformers class, its config, and what turns input into tensors."""

    architecture: str
    config: Callable[[], Any]
    processor: Callable[[], tuple[Any, ...]]


def write(name: str, folder: Path) -> Path:
    """`folder`, filled with the model `name`: config, bf16 weights, tokenizer or processor, chat template.

    Same name, same bytes. Raises KeyError for a name that is not in NAMES.
    """
    return write_recipe(RECIPES[name], name, folder)


def write_recipe(recipe: Recipe, name: str, folder: Path) -> Path:
    """`write` of a model that NAMES does not have; `name` seeds its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = recipe.config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model = getattr(transformers, recipe.architecture)(config)
        draw_weights(model)
    if model.can_generate():
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD, do_sample=False
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    for part in recipe.processor():
        part.save_pretrained(folder)
    return folder


def draw_weights(model: Any) -> None:
    """Fills `model` so that signals keep their size through every layer and logits are far from flat."""
    head = model.get_output_embeddings()
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if not parameter.numel():
            continue
        if "gate" in leaf and parameter.ndim < 2:  # Mllama's tanh gates; zeros would cut the image off
            parameter.data.fill_(0.5)
        elif head is not None and parameter is head.weight:  # tied embeddings come here too
            parameter.data.normal_(std=3 / parameter.shape[1] ** 0.5)
            # Ids without a text of their own, which would make a greedy answer empty; END may come.
            parameter.data[[i for i in range(FIRST_MARKER + len(QWEN_MARKERS)) if i != END]] *= 0.1
        elif "embed" in name and parameter.ndim == 2:
            parameter.data.normal_(std=0.5)
        elif parameter.ndim == 3:  # of experts, of which each dimension but the first may be read
            parameter.data.normal_(std=1.5 * min(parameter.shape[1:]) ** -0.5)
        elif parameter.ndim >= 2:
            parameter.data.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        elif leaf == "bias":
            parameter.data.normal_(std=0.05)
        else:
            parameter.data.normal_(mean=1.0, std=0.1)


def questions(name: str, count: int = 1, answer: str | None = None) -> list[Sample]:
    """`count` samples that the model `name` can read, with a noisy picture if it sees."""
    prompts = ("what does the image show?", "which one is larger, the left bar or the right bar?", "a cat")
    return [
        Sample(
            id=f"question-{number}",
            turns=asked(prompts[number % len(prompts)], picture(number) if name in VISION_NAMES else None),
            answer=answer,
        )
        for number in range(count)
    ]


def picture(seed: int) -> bytes:
    """A PNG of 40 x 56 random pixels, the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def frames(*seeds: int) -> list[Image.Image]:
    """Images of 56 x 40 pixels, each of one gray, the same for the same seeds."""
    return [Image.new("L", (56, 40), 40 * seed + 10) for seed in seeds]


def animation(*seeds: int) -> bytes:
    """A GIF of those `frames`."""
    first, *more = frames(*seeds)
    file = io.BytesIO()
    first.save(file, format="GIF", save_all=True, append_images=more, duration=500)
    return file.getvalue()


# Tokenizers and processors ------------------------------------------------------------------------------


def make_tokenizer(markers: tuple[str, ...], vocab: int = VOCAB, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `vocab` ids whose texts are plain ASCII.

    Its alphabet is ASCII, so that whatever a random model generates decodes to text that encodes again.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ascii_alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # byte-level space and newline
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=ascii_alphabet,
        special_tokens=[*CONTROLS, *markers],
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS, CORPUS.upper()], trainer)
    assert tokenizer.get_vocab_size() == vocab, tokenizer.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|bos|>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        model_max_length=512,
        **options,
    )


def chat_template(image: str) -> str:
    """A chat template for contents that are text or lists of parts; `image` marks a picture."""
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|user|>' if message['role'] != 'assistant' else '<|assistant|>' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        + image
        + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def text_tokenizer() -> tuple[Any, ...]:
    tokenizer = make_tokenizer(())
    tokenizer.chat_template = chat_template("")
    return (tokenizer,)


def encoder_tokenizer() -> tuple[Any, ...]:
    return (make_tokenizer(()),)


def mllama_processor() -> tuple[Any, ...]:
    # Mllama's image token lies behind the vocabulary of its head, as on the hub.
    tokenizer = make_tokenizer(())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    image_processor = MllamaImageProcessorPil(
        size={"height": 28, "width": 28}, max_image_tiles=2, do_convert_rgb=True
    )
    template = chat_template("<|image|>")
    return (MllamaProcessor(image_processor, tokenizer, chat_template=template),)


def qwen_parts() -> tuple[Any, ...]:
    """Tokenizer and image processor as two files, as Qwen's folders on the hub have them.

    The joined processor cannot be made here: its class insists on a video processor, which needs torchvision.
    """
    tokenizer = make_tokenizer(QWEN_MARKERS)
    tokenizer.chat_template = chat_template("<|vision_start|><|image_pad|><|vision_end|>")
    # At least one and at most six merged tokens of 28 x 28 pixels.
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 6 * 28 * 28})
    return tokenizer, images


def llava_processor() -> tuple[Any, ...]:
    processor = LlavaProcessor(
        PixtralImageProcessorPil(size={"longest_edge": 42}, patch_size={"height": 14, "width": 14}),
        make_tokenizer(PIXTRAL_MARKERS),
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=chat_template("[IMG]"),
        image_token="[IMG]",
    )
    return (processor,)


# Configs ------------------------------------------------------------------------------------------------

IDS = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD}


def decoder(hidden: int, intermediate: int, layers: int) -> dict[str, Any]:
    """The options of a small language model: 4 heads, 2 key-value heads."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        **IDS,
    }


def mllama_config() -> MllamaConfig:
    vision = MllamaVisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=4,
        intermediate_size=128,
        vision_output_dim=128,  # the last hidden state and one intermediate layer
        intermediate_layers_indices=[0],
        image_size=28,
        patch_size=14,
        max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )
    text = MllamaTextConfig(cross_attention_layers=[1], **decoder(64, 96, 3))
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB, **IDS)


def qwen_text(layers: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return {**decoder(64, 96, layers), "rope_parameters": rope}


def qwen_markers() -> dict[str, int]:
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {key: FIRST_MARKER + offset for offset, key in enumerate(keys)}


def qwen2_vl_config() -> Qwen2VLConfig:
    """Tied, as the 2B model is."""
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4}
    return Qwen2VLConfig(
        text_config=qwen_text(2), vision_config=vision, tie_word_embeddings=True, **qwen_markers()
    )


def qwen2_5_vl_config() -> Qwen2_5_VLConfig:
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "out_hidden_size": 64,
        "intermediate_size": 108,  # as little a multiple of 64 as the real model's 3420
        "num_heads": 4,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(text_config=qwen_text(3), vision_config=vision, **qwen_markers())


def llava_pixtral_config() -> LlavaConfig:
    vision = PixtralVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=42,
        patch_size=14,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=MistralConfig(head_dim=32, **decoder(128, 192, 2)),
        image_token_index=FIRST_MARKER,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def llama_config() -> LlamaConfig:
    return LlamaConfig(**decoder(64, 96, 3))


def llama_tied_config() -> LlamaConfig:
    return LlamaConfig(tie_word_embeddings=True, **decoder(64, 128, 2))


def bert_config() -> BertConfig:
    """60 x 60 = 3600 weights are 56.25 blocks of 64: the last block is ragged."""
    return BertConfig(
        vocab_size=VOCAB,
        hidden_size=60,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=100,
        max_position_embeddings=512,
        pad_token_id=PAD,
    )


RECIPES = {
    "mllama": Recipe("MllamaForConditionalGeneration", mllama_config, mllama_processor),
    "qwen2_vl": Recipe("Qwen2VLForConditionalGeneration", qwen2_vl_config, qwen_parts),
    "qwen2_5_vl": Recipe("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl_config, qwen_parts),
    "llava_pixtral": Recipe("LlavaForConditionalGeneration", llava_pixtral_config, llava_processor),
    "llama": Recipe("LlamaForCausalLM", llama_config, text_tokenizer),
    "llama_tied": Recipe("LlamaForCausalLM", llama_tied_config, text_tokenizer),
    "bert": Recipe("BertModel", bert_config, encoder_tokenizer),
}

NAMES = tuple(RECIPES)
VISION_NAMES = ("mllama", "qwen2_vl", "qwen2_5_vl", "llava_pixtral")
TEXT_NAMES = ("llama", "llama_tied")
GENERATING_NAMES = VISION_NAMES + TEXT_NAMES


def as_in_the_hub_cache(folder: Path, cache: Path) -> Path:
    """The checkpoint as the cache of the hub holds it: names that point to files named by their hashes."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, blobs)
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(blob)
    return snapshot
