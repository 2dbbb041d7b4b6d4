"""The language model in `tests.benchmarks.backbone` stays itself where there is no image."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qprobe.demo.train import Shape, build_model
from tests.benchmarks.backbone import cross_attention_layers, groups_of, inserted


def test_cross_attention_layers_stand_amid_the_others():
    assert cross_attention_layers(10, 5) == [3, 9]
    # 30 text layers: 6 more, the last before the 28th text layer
    assert cross_attention_layers(30, 5) == [3, 9, 15, 21, 27, 33]


def test_inserted_layers_change_no_logit_of_text():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    text = LlamaForCausalLM(config).eval()
    model = inserted(text, build_model(Shape(vision_layers=4)), image_token=50, every=2).eval()
    ids = torch.randint(3, 50, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, text(input_ids=ids).logits)


def test_everything_but_the_language_model_learns_from_the_start():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    model = inserted(LlamaForCausalLM(config), build_model(Shape(vision_layers=4)), image_token=50, every=2)
    groups = groups_of(model)
    names = {id(p): name for name, p in model.named_parameters()}
    new = {names[id(p)] for p in groups.new}
    assert len(groups.new) + len(groups.text) == len(names)
    assert all("vision_model" in n or "projector" in n or ".layers.2." in n or ".layers.5." in n for n in new)
