"""Tiny mixtures of experts, fused in every way that transformers does it, as complete model folders.

Two layers of four experts each. DeepSeek-V3's first layer is dense; GPT-OSS and Llama 4 store their experts
transposed, and Llama 4 hands each of them rows of all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

from qprobe.checkpoint.ready import ready_for_training
from tests.tiny import Recipe, decoder, qwen_markers, qwen_parts, text_tokenizer

EXPERTS = 4


def qwen3_moe() -> Any:
    return Qwen3MoeConfig(
        **decoder(64, 96, 2),
        moe_intermediate_size=64,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        head_dim=16,
    )


def qwen3_vl_moe() -> Any:
    text = {
        **decoder(64, 96, 2),
        "moe_intermediate_size": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "out_hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **qwen_markers())


def mixtral() -> Any:
    return MixtralConfig(**decoder(64, 64, 2), num_local_experts=EXPERTS)


def deepseek_v3() -> Any:
    return DeepseekV3Config(
        **{**decoder(64, 96, 2), "num_key_value_heads": 4},
        moe_intermediate_size=64,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        n_shared_experts=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )


def gpt_oss() -> Any:
    return GptOssConfig(
        **decoder(64, 64, 2),
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def llama4() -> Any:
    return Llama4TextConfig(
        **decoder(64, 64, 2),
        intermediate_size_mlp=64,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        head_dim=16,
    )


RECIPES = {
    "qwen3_moe": Recipe("Qwen3MoeForCausalLM", qwen3_moe, text_tokenizer),
    "qwen3_vl_moe": Recipe("Qwen3VLMoeForConditionalGeneration", qwen3_vl_moe, qwen_parts),
    "mixtral": Recipe("MixtralForCausalLM", mixtral, text_tokenizer),
    "deepseek_v3": Recipe("DeepseekV3ForCausalLM", deepseek_v3, text_tokenizer),
    "gpt_oss": Recipe("GptOssForCausalLM", gpt_oss, text_tokenizer),
    "llama4": Recipe("Llama4ForCausalLM", llama4, text_tokenizer),
}
NAMES = tuple(RECIPES)
IDS = torch.arange(20, 32)[None]


def three_steps(model: torch.nn.Module) -> list[float]:
    """Losses of three steps of LoRA on attention."""
    ready_for_training(model)
    torch.manual_seed(0)
    pattern = r".*self_attn\.(q_proj|o_proj|q_a_proj)"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=pattern, lora_dropout=0.0))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    adapted.unload()
    return losses
