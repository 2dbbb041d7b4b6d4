"""Tiny models that read text alone: decoders, mixtures of experts, state spaces, encoders, their heads.

Each is the class of transformers with a small config; what is not named here is the class's own default.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers

from tests import mixtures, sequences, tiny
from tests.tiny import IDS, VOCAB, Recipe, encoder_tokenizer, text_tokenizer

DECODER = tiny.decoder(64, 96, 2)
HEAD_16 = {"head_dim": 16}
# GPT-2 and its kin name their sizes otherwise; attribute_map makes these the same.
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    **IDS,
}
GPT = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, **IDS}
SEQUENCES = {**sequences.BART, "decoder_start_token_id": tiny.BOS}
T5 = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
MULTI_QUERY = {"num_key_value_heads": 4}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
MLA = {
    **MULTI_QUERY, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
RECURRENT = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, **IDS}

DECODERS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Ministral3ForCausalLM": HEAD_16,
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": HEAD_16,
    "GemmaForCausalLM": HEAD_16,
    "Gemma2ForCausalLM": {**HEAD_16, "query_pre_attn_scalar": 16},
    "Gemma3ForCausalLM": {**HEAD_16, "query_pre_attn_scalar": 16},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "OlmoForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": {},
    "CohereForCausalLM": {},
    "Cohere2ForCausalLM": {},
    "GlmForCausalLM": HEAD_16,
    "Glm4ForCausalLM": HEAD_16,
    "GraniteForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "NemotronForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "Ernie4_5ForCausalLM": HEAD_16,
    "Exaone4ForCausalLM": {},
    "HunYuanDenseV1ForCausalLM": HEAD_16,
    "SeedOssForCausalLM": HEAD_16,
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "DiffLlamaForCausalLM": {},
    "DogeForCausalLM": {},
    "BitNetForCausalLM": {},
    "MiniCPM3ForCausalLM": {**MLA, "dim_model_base": 64},
    "Gemma3nForCausalLM": {  # embeddings per layer, alternating updates, layers that share keys and values
        **HEAD_16, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [96] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 8,
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
}  # fmt: skip
EXPERT_MODELS: dict[str, dict[str, Any]] = {
    "Qwen2MoeForCausalLM": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "PhimoeForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Glm4MoeForCausalLM": {
        **EXPERTS, **HEAD_16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "Ernie4_5_MoeForCausalLM": {
        **HEAD_16, "moe_intermediate_size": 64, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1,
    },
    "JetMoeForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    "DeepseekV2ForCausalLM": {
        **EXPERTS, **MULTI_QUERY, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 16,
    },
    "Qwen3NextForCausalLM": {
        **EXPERTS, **HEAD_16, "num_experts": 4, "shared_expert_intermediate_size": 64,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    },
    "DeepseekV32ForCausalLM": {  # attention to what an indexer picks
        **EXPERTS, **MLA, **ROUTED, "index_topk": 8, "index_head_dim": 32, "index_n_heads": 2,
        "head_dim": 16, "first_k_dense_replace": 1,
    },
    "LongcatFlashForCausalLM": {  # two of the experts do nothing
        **MLA, "num_layers": 2, "ffn_hidden_size": 96, "head_dim": 16, "moe_topk": 2, "n_routed_experts": 4,
        "zero_expert_num": 2, "expert_ffn_hidden_size": 64,
    },
}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {
    "JambaForCausalLM": {
        "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 8, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "BambaForCausalLM": {**MAMBA2, "attn_layer_indices": [1]},
    "FalconH1ForCausalLM": {**MAMBA2, "mamba_d_ssm": 128, **HEAD_16},
    "GraniteMoeHybridForCausalLM": {
        **MAMBA2, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
    },
    "Zamba2ForCausalLM": {
        **MULTI_QUERY, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_d_state": 8, "mamba_ngroups": 1, "num_mem_blocks": 1,
        "adapter_rank": 8,
    },
    "RecurrentGemmaForCausalLM": {
        "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 64, **HEAD_16,
    },
    "ZambaForCausalLM": {
        **MULTI_QUERY, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "NemotronHForCausalLM": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "moe", "attention", "mamba"], **HEAD_16,
        "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1,
        "n_routed_experts": 4, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
        "use_mamba_kernels": False,
    },
    "KimiLinearForCausalLM": {
        **MLA, "q_lora_rank": None, "moe_intermediate_size": 64, "num_experts_per_tok": 2,
        "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"], "linear_head_dim": 16, "linear_num_heads": 4,
    },
    "MiniMaxForCausalLM": {
        **HEAD_16, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"],
        "block_size": 16,
    },
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": GPT,
    "GPTBigCodeForCausalLM": GPT,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 8},
    "GPTNeoXForCausalLM": ENCODER,
    "OPTForCausalLM": {
        "vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": 64, **IDS,
    },
    "BloomForCausalLM": {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, **IDS},
    "FalconForCausalLM": {**ENCODER, "ffn_hidden_size": 96},
    "MptForCausalLM": {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, **IDS},
    "MambaForCausalLM": {**RECURRENT, "state_size": 8},
    "Mamba2ForCausalLM": {**RECURRENT, "state_size": 16, "head_dim": 16, "num_heads": 8, "n_groups": 1},
    "FalconMambaForCausalLM": {**RECURRENT, "state_size": 8},
    "CTRLLMHeadModel": {**GPT, "dff": 96},
    "RwkvForCausalLM": {**RECURRENT, "attention_hidden_size": 64, "intermediate_size": 96},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": ENCODER,
    "BertForPreTraining": ENCODER,
    "BertForSequenceClassification": {**ENCODER, "num_labels": 3},
    "BertForTokenClassification": {**ENCODER, "num_labels": 5},
    "BertForQuestionAnswering": ENCODER,
    "RobertaForMaskedLM": ENCODER,
    "RobertaModel": ENCODER,
    "ModernBertForMaskedLM": {**ENCODER, "cls_token_id": 1, "sep_token_id": 3},
    "ModernBertModel": {**ENCODER, "cls_token_id": 1, "sep_token_id": 3},
    "ElectraForSequenceClassification": {**ENCODER, "embedding_size": 64},
    "DebertaV2Model": {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "MPNetModel": ENCODER,
    "DistilBertModel": {
        "vocab_size": VOCAB, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, **IDS,
    },
    "AlbertModel": {**ENCODER, "embedding_size": 32},
    "T5EncoderModel": T5,
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "LlamaForSequenceClassification": {"num_labels": 3},
    "Qwen2ForSequenceClassification": {"num_labels": 1},  # as reward models are
    "LlamaModel": {},
}
T5_WHOLE = {**T5, "decoder_start_token_id": tiny.PAD, **IDS}
GEMMA = {**DECODER, **HEAD_16, "query_pre_attn_scalar": 16, "sliding_window": 8}
TWIN = {"model_type": "bert", **{k: v for k, v in ENCODER.items() if k not in IDS}}
SEQUENCE_MODELS: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": T5_WHOLE,
    "MT5ForConditionalGeneration": T5_WHOLE,
    "UMT5ForConditionalGeneration": T5_WHOLE,
    "LongT5ForConditionalGeneration": {**T5_WHOLE, "local_radius": 7},
    "SwitchTransformersForConditionalGeneration": {
        **T5_WHOLE, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    },
    "BartForConditionalGeneration": SEQUENCES,
    "BartForSequenceClassification": {**SEQUENCES, "num_labels": 3},
    "BartModel": SEQUENCES,
    "MarianMTModel": {**SEQUENCES, "decoder_vocab_size": VOCAB},
    "MBartForConditionalGeneration": SEQUENCES,
    "M2M100ForConditionalGeneration": SEQUENCES,
    "NllbMoeForConditionalGeneration": {
        **SEQUENCES, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
        "expert_capacity": 64,
    },
    "PegasusForConditionalGeneration": SEQUENCES,
    "LEDForConditionalGeneration": {
        **SEQUENCES, "attention_window": [8, 8], "max_encoder_position_embeddings": 512,
        "max_decoder_position_embeddings": 512,
    },
    "ProphetNetForConditionalGeneration": {
        "vocab_size": VOCAB, "hidden_size": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
        "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "max_position_embeddings": 512,
        "decoder_start_token_id": tiny.BOS, **IDS,
    },
    "T5GemmaForConditionalGeneration": {"encoder": GEMMA, "decoder": GEMMA, "vocab_size": VOCAB},
    "FSMTForConditionalGeneration": {
        **{k: v for k, v in SEQUENCES.items() if k != "vocab_size"}, "langs": ["en", "de"],
        "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "decoder": {"vocab_size": VOCAB},
    },
    "SpeechT5ForTextToSpeech": {
        "vocab_size": VOCAB, "hidden_size": 64, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96, **IDS,
    },
    "EncoderDecoderModel": {
        "encoder": TWIN, "decoder": {**TWIN, "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": tiny.BOS, **IDS,
    },
}  # fmt: skip


def config_of(architecture: str, given: dict[str, Any]) -> Any:
    """The config of a class of transformers, with `given` in place of its defaults."""
    return getattr(transformers, architecture).config_class(**given)


def _recipe(architecture: str, given: dict[str, Any], reads_chat: bool = True) -> Recipe:
    processor = text_tokenizer if reads_chat else encoder_tokenizer
    if architecture.startswith("Bart"):  # whose classifier reads the end of a text
        processor = sequences.RECIPES["bart"].processor
    return Recipe(architecture, partial(config_of, architecture, given), processor)


def recipes() -> dict[str, Recipe]:
    """Recipes by name, which is the class's unless one class is there twice."""
    on_decoder = {**DECODERS, **EXPERT_MODELS, **HYBRIDS, **HEADS}
    tied = {**DECODER, "tie_word_embeddings": True}
    return {
        **{name: _recipe(name, {**DECODER, **given}) for name, given in on_decoder.items()},
        "LlamaForCausalLM, tied": _recipe("LlamaForCausalLM", tied),
        **{name: _recipe(name, given) for name, given in OTHERS.items()},
        **{recipe.architecture: recipe for recipe in mixtures.RECIPES.values()},
        "BertModel, ragged blocks": tiny.RECIPES["bert"],
        **{name: _recipe(name, given, False) for name, given in ENCODERS.items()},
        **{name: _recipe(name, given, False) for name, given in SEQUENCE_MODELS.items()},
    }
