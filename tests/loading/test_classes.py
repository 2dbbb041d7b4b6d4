"""The class that `architectures` names, through every auto class of transformers, with its head."""

from __future__ import annotations

import pytest
import transformers
from torch import nn
from transformers import PreTrainedConfig

from qprobe.errors import ModelError
from qprobe.loading.config import model_class
from qprobe.loading.skeleton import meta_model

WIDTHS = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}
T5 = {"vocab_size": 32, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}
CLIP = {
    "text_config": {**WIDTHS, **HEADS},
    "vision_config": {**WIDTHS, **HEADS, "image_size": 8, "patch_size": 4},
}
CASES = {
    "BertModel": ("bert", {**WIDTHS, **HEADS}, "pooler.dense"),
    "BertForMaskedLM": ("bert", {**WIDTHS, **HEADS}, "cls.predictions.transform.dense"),
    "BertForPreTraining": ("bert", {**WIDTHS, **HEADS}, "cls.seq_relationship"),
    "BertForSequenceClassification": ("bert", {**WIDTHS, **HEADS}, "classifier"),
    "BertForTokenClassification": ("bert", {**WIDTHS, **HEADS}, "classifier"),
    "BertForQuestionAnswering": ("bert", {**WIDTHS, **HEADS}, "qa_outputs"),
    "LlamaModel": ("llama", {**WIDTHS, **HEADS}, "layers.0.mlp.up_proj"),
    "LlamaForCausalLM": ("llama", {**WIDTHS, **HEADS}, "lm_head"),
    "LlamaForSequenceClassification": ("llama", {**WIDTHS, **HEADS}, "score"),
    "T5ForConditionalGeneration": ("t5", T5, "lm_head"),
    "T5EncoderModel": ("t5", T5, "encoder.block.0.layer.0.SelfAttention.q"),
    "BartForConditionalGeneration": ("bart", {"vocab_size": 32, "d_model": 16}, "lm_head"),
    "CLIPModel": ("clip", CLIP, "text_projection"),
    "SiglipModel": ("siglip", CLIP, "text_model.head"),
    "CLIPTextModelWithProjection": ("clip_text_model", {**WIDTHS, **HEADS}, "text_projection"),
    "ViTForImageClassification": ("vit", {**WIDTHS, **HEADS, "image_size": 8, "patch_size": 4}, "classifier"),
}


def config_of(architecture: str | None, model_type: str, given: dict) -> PreTrainedConfig:
    config = transformers.AutoConfig.for_model(model_type, **given)
    config.architectures = None if architecture is None else [architecture]
    return config


@pytest.mark.parametrize("architecture", CASES)
def test_the_class_that_the_config_names_is_built_with_its_head(architecture: str):
    model_type, given, head = CASES[architecture]
    model = meta_model(config_of(architecture, model_type, given), "bfloat16")
    assert type(model) is getattr(transformers, architecture)
    assert isinstance(model.get_submodule(head), nn.Linear)


def test_a_class_that_transformers_does_not_have_is_refused_and_none_is_put_in_its_place():
    with pytest.raises(ModelError, match=r"names the class BertForFortunes, .* model type 'bert'"):
        model_class(config_of("BertForFortunes", "bert", {}))
    with pytest.raises(ModelError, match="names the class LlamaForCausalLM"):
        model_class(config_of("LlamaForCausalLM", "bert", {}))


def test_a_config_that_names_no_class_gets_the_one_that_answers():
    assert type(meta_model(config_of(None, "llama", {**WIDTHS, **HEADS}), "bfloat16")).__name__ == (
        "LlamaForCausalLM"
    )
