"""One forward tells a 4-bit weight that its layer reads from one whose codes are taken for numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qprobe.checkpoint.trial.sample import trial_batch
from qprobe.checkpoint.trial.watch import prove_read, watching
from qprobe.errors import VerificationError
from qprobe.loading.config import build
from qprobe.loading.skeleton import meta_model
from qprobe.measure.outputs import run_model
from tests.tiny import VOCAB, decoder, text_tokenizer


class Mixed(nn.Module):
    """Two 4-bit layers; how the second one's weight is read is chosen, in words that no source code shows."""

    main_input_name = "input_ids"
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=16))
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 64)
        self.first, self.second = (
            Linear4bit(64, 64, bias=False, compute_dtype=torch.float32).to("cpu") for _ in range(2)
        )
        self.reads = reads

    def can_generate(self) -> bool:
        return False

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.first(self.embed(input_ids))
        weight = getattr(self.second, "weigh" + "t")
        if self.reads == "asked":
            x = x.to(weight.device)
            return self.second(x) if weight.shape else x
        codes = weight.data if self.reads == "data" else weight
        return x * codes.float().mean() if self.reads != "failing" else x @ codes


@pytest.mark.parametrize("reads", ["data", "bare", "failing"])
def test_a_weight_that_is_read_without_its_layer_is_named(reads: str):
    with pytest.raises(VerificationError, match=r"1 layer in 4-bit cannot be: second\. Mixed reads"):
        prove_read(Mixed(reads), None)


def test_layers_that_read_their_own_weights_pass_and_no_hook_is_left():
    model = Mixed("asked")
    assert prove_read(model, None).ran == {"first", "second"}
    assert not model.first._forward_pre_hooks and not model.first._forward_hooks


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_where_memory_does_not_suffice_for_the_sample_nothing_is_held_against_the_model(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr("torch.nn.functional.embedding", fail)
    assert prove_read(Mixed("asked"), None).beside == set()


def test_a_failed_layer_leaves_the_watch_as_it_was():
    model = Mixed("bare")
    with watching(model) as reads, pytest.raises(RuntimeError):
        model.first(torch.zeros(1, 3))
    assert reads.ran == {"first"} and not reads.beside
    with watching(model) as reads:
        model(torch.arange(4)[None])
    assert reads.beside == {"second"}


def test_a_model_that_reads_no_text_is_not_tried():
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.architectures = ["ViTModel"]
    assert trial_batch(meta_model(config, "bfloat16"), transformers.ViTImageProcessorPil()) is None


def test_a_processor_that_refuses_the_sample_leaves_bare_tokens():
    def refuses(*_: object, **__: object) -> None:
        raise ValueError("no text today")

    model = build(transformers.LlamaConfig(**decoder(32, 32, 1)), torch.float32)
    tokenizer = text_tokenizer()[0]
    plain, bare = (trial_batch(model, x) for x in (tokenizer, None))
    tokenizer.apply_chat_template = refuses
    found = trial_batch(model, tokenizer)
    assert plain is not None and bare is not None and found is not None
    assert torch.equal(found.inputs["input_ids"], bare.inputs["input_ids"])
    assert plain.inputs["input_ids"].shape != bare.inputs["input_ids"].shape


@pytest.mark.parametrize("named", [3, None])
def test_the_decoder_behind_an_encoder_is_begun(named: int | None):
    config = transformers.T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=1)
    config.architectures, config.decoder_start_token_id = ["T5ForConditionalGeneration"], named
    model = build(config, torch.float32)
    batch = trial_batch(model, text_tokenizer()[0])
    assert batch is not None and batch.samples[0].id == "question"
    assert batch.inputs["decoder_input_ids"].tolist() == [[named or 0]]
    assert run_model(model, batch).logits.shape == (1, 1, VOCAB)
