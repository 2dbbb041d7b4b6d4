"""Parameter counts by hand, from published shapes alone; nothing of transformers or qprobe.

Each formula gives a count that somebody published for one model; then it is used for models of the same
architecture whose exact count nobody did. Biases and norms are written where they are.
"""

from __future__ import annotations


def decoder(vocab: int, h: int, i: int, layers: int, kv: int, *, q: int = 0, bias: bool = False) -> int:
    """A Llama-like decoder with its own output layer: q, k, v, o; gate, up, down; two norms a layer.

    kv: width of keys; q: width of queries (0: h); bias: on q, k and v, as Qwen2 has.
    """
    q = q or h
    attention = 2 * h * q + 2 * h * kv + (q + 2 * kv if bias else 0)
    return 2 * vocab * h + layers * (attention + 3 * h * i + 2 * h) + h


def siglip(patches: int, patch: int = 14, h: int = 1152, i: int = 4304, layers: int = 27) -> int:
    """SigLIP's vision model without head: everything has a bias, norms have two vectors."""
    embeddings = 3 * patch * patch * h + h + patches * h
    layer = 4 * (h * h + h) + (h * i + i) + (i * h + h) + 4 * h
    return embeddings + layers * layer + 2 * h


def idefics3(text: int, text_h: int, patches: int, scale: int) -> int:
    """Idefics3 and SmolVLM: SigLIP so400m, one linear without bias on scale * scale joined patches, text."""
    return siglip(patches) + scale * scale * 1152 * text_h + text


def mllama(h: int, i: int, self_layers: int, cross_layers: int, patches: int) -> int:
    """Llama 3.2 Vision. patches: of one tile, with the class token."""
    v = 1280
    position = (
        1 + patches * v + 9 * 4 * patches * v
    )  # gate, table, and a table of 4 tiles for 9 aspect ratios
    tiles = 2 * (1 + 9 * 4 * v)  # before and after the layers
    layer = 4 * v * v + (v * 5120 + 5120) + (5120 * v + v) + 4 * v
    vision = 3 * 14 * 14 * v + v + position + tiles + 4 * v + 32 * layer + 8 * (layer + 2)
    projector = 7680 * h + h
    attention = 2 * h * h + 2 * h * 1024  # 8 key-value heads of 128
    rest = 3 * h * i + 2 * h
    cross = attention + 2 * 128 + rest + 2  # norms of q and k, two gates
    text = (128256 + 8) * h + self_layers * (attention + rest) + cross_layers * cross + h + 128256 * h
    return vision + projector + text


def pixtral(text: int, text_h: int) -> int:
    """Pixtral: 24 layers of width 1024 without biases, a projector of two linears with biases, a decoder."""
    v = 1024
    vision = 3 * 16 * 16 * v + v + 24 * (4 * v * v + 3 * v * 4096 + 2 * v)
    return vision + (v * text_h + text_h) + (text_h * text_h + text_h) + text


def qwen2_5_vl(text: int, text_h: int, i: int) -> int:
    """Qwen2.5-VL. i: width of the vision MLP (gated, with biases); the merger joins 2 x 2 patches."""
    v = 1280
    layer = (v * 3 * v + 3 * v) + (v * v + v) + 2 * (v * i + i) + (i * v + v) + 2 * v
    merger = v + (5120 * 5120 + 5120) + (5120 * text_h + text_h)
    return 3 * 2 * 14 * 14 * v + 32 * layer + merger + text


LLAMA_8B = decoder(128256, 4096, 14336, 32, 1024)
SMOLLM2_1_7B = decoder(49280, 2048, 8192, 24, 2048)
NEMO_12B = decoder(131072, 5120, 14336, 40, 1024, q=4096)
QWEN_72B = decoder(152064, 8192, 29568, 80, 1024, bias=True)

# Geometry -> its count by hand. First those that somebody published, which prove the formulas.
COUNTS = {
    "llama-3.1-8b": LLAMA_8B,
    "smolvlm2-2.2b": idefics3(SMOLLM2_1_7B, 2048, patches=27 * 27, scale=3),
    "llama-3.2-11b-vision": mllama(4096, 14336, 32, 8, patches=40 * 40 + 1),
    "qwen2.5-vl-7b": qwen2_5_vl(decoder(152064, 3584, 18944, 28, 512, bias=True), 3584, 3420),
    "qwen2.5-vl-32b": qwen2_5_vl(decoder(152064, 5120, 27648, 64, 1024, bias=True), 5120, 3456),
    "llama-3.2-11b-vision-448": mllama(4096, 14336, 32, 8, patches=32 * 32 + 1),
    "llama-3.2-90b-vision": mllama(8192, 28672, 80, 20, patches=40 * 40 + 1),
    "qwen2.5-vl-72b": qwen2_5_vl(QWEN_72B, 8192, 3456),
    "pixtral-12b": pixtral(NEMO_12B, 5120),
    "idefics3-8b": idefics3(LLAMA_8B + 2 * 3 * 4096, 4096, patches=26 * 26, scale=2),  # 3 tokens more
}
