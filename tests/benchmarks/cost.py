"""What a scan costs at full size, in bare forward passes of the same samples, all from one run.

    python -m tests.benchmarks.cost [--device cuda]

Builds the exact geometry of Llama-3.2-11B-Vision with seeded random weights in memory, a batch of 4 images of
4 tiles with 256 text tokens of which 64 are the answer, and runs the measuring code of the library on it.
Prints seconds, ratios and peak device memory of each stage. `--tiny` checks the script on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from qprobe.inputs.batch import ANSWER, TEXT, Batch
from qprobe.loading.inventory import fingerprint
from qprobe.loading.reference import Reference
from qprobe.loading.skeleton import Skeleton
from qprobe.loading.source import Source
from qprobe.measure.attribution import attribute, walking
from qprobe.measure.outputs import run_model
from qprobe.measure.runner import observe, observe_isolated, observe_outputs
from qprobe.measure.subject import Subject, subject_of
from qprobe.measure.weights import weight_rows
from qprobe.records import FormatSpec, ModelIdentity, Sample, asked
from qprobe.runs.key import Measures

SAMPLES, TEXT_TOKENS, ANSWER_TOKENS, SEED = 4, 256, 64, 0


def full_config() -> MllamaConfig:
    """The geometry of Llama-3.2-11B-Vision: the defaults of transformers with 560-pixel tiles."""
    config = MllamaConfig(architectures=["MllamaForConditionalGeneration"])
    config.vision_config.image_size = 560
    return config


def tiny_config() -> MllamaConfig:
    """The same architecture at a size for a CPU."""
    return MllamaConfig(
        vision_config={
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_global_layers": 1,
            "attention_heads": 4, "intermediate_layers_indices": [0, 1], "vision_output_dim": 384,
            "image_size": 56,
        },
        text_config={
            "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3],
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        image_token_index=512,
        architectures=["MllamaForConditionalGeneration"],
    )  # fmt: skip


def build(config: MllamaConfig, device: torch.device) -> Reference:
    """A frozen bf16 model with random weights, on the device."""
    torch.manual_seed(SEED)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = MllamaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        is_gate = "gate" in name.rpartition(".")[2] and parameter.numel() == 1
        if is_gate:
            parameter.data.fill_(0.5)
    model.eval().requires_grad_(False)
    identity = ModelIdentity("llama-3.2-11b-vision-random", None, type(model).__name__, fingerprint(model))
    return Reference(model, None, identity, Skeleton(Source("random", "nowhere"), model.config, "bfloat16"))


def make_batch(config: MllamaConfig, device: torch.device) -> Batch:
    """Four samples of four tiles; the answer is the last `ANSWER_TOKENS` of the text."""
    generator = torch.Generator().manual_seed(SEED)
    vision = config.vision_config
    size, tiles = vision.image_size, vision.max_num_tiles
    ids = torch.randint(3, config.text_config.vocab_size - 8, (SAMPLES, TEXT_TOKENS), generator=generator)
    ids[:, 1] = config.image_token_index
    pixels = torch.randn(SAMPLES, 1, tiles, 3, size, size, generator=generator)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(torch.bfloat16),
        "aspect_ratio_ids": torch.full((SAMPLES, 1), 6),  # 2 x 2 tiles
        "aspect_ratio_mask": torch.ones(SAMPLES, 1, tiles, dtype=torch.long),
        "cross_attention_mask": torch.ones(SAMPLES, TEXT_TOKENS, 1, tiles, dtype=torch.long),
    }
    kinds = torch.full(ids.shape, TEXT, dtype=torch.uint8)
    kinds[:, -ANSWER_TOKENS:] = ANSWER
    samples = tuple(Sample(f"random-{i}", asked(str(i)), answer="random") for i in range(SAMPLES))
    spans = ((TEXT_TOKENS - ANSWER_TOKENS, TEXT_TOKENS),) * SAMPLES
    return Batch(samples, inputs, kinds, spans).to(device)


def timed(device: torch.device, work: Callable[[], object], repeats: int = 3) -> tuple[float, float]:
    """(median seconds, peak GiB) of `work` after one warm-up run."""
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    return sorted(seconds)[len(seconds) // 2], peak


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bare_forward(subject: Subject, batch: Batch) -> None:
    """The 16-bit model on the batch, nothing else."""
    with torch.inference_mode():
        run_model(subject.model, batch)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also list the kernels that take longest")
    options = parser.parse_args()
    device = torch.device(options.device)
    config = tiny_config() if options.tiny else full_config()
    start = time.perf_counter()
    reference = build(config, device)
    synchronize(device)
    print(f"build {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    subject = subject_of(reference, FormatSpec())
    synchronize(device)
    print(f"pack every weight {time.perf_counter() - start:.2f} s", flush=True)
    start = time.perf_counter()
    weight_rows(subject.dequantized)
    print(f"weight error {time.perf_counter() - start:.2f} s", flush=True)
    batch = make_batch(config, device)
    report(subject, batch, device)
    if options.profile:
        profile(subject, batch)


def profile(subject: Subject, batch: Batch) -> None:
    """The operations that take longest in each stage."""
    for name, work in (
        ("outputs", lambda: observe_outputs(subject, batch, Measures(True, False))),
        ("observe", lambda: observe(subject, Measures(True, True, 2, float("inf")), batch)),
    ):
        with torch.profiler.profile() as found:
            work()
            synchronize(subject.reference.device)
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(
            name, found.key_averages().table(sort_by=key, row_limit=22, max_name_column_width=60), flush=True
        )


def report(subject: Subject, batch: Batch, device: torch.device) -> None:
    """Seconds, ratio to the bare forward and peak memory of each stage."""
    path, forever = subject.path, float("inf")
    given = batch.in_dtype(path.dtype)
    print(f"{subject.reference.identity.id}: path in {path.dtype}; batch of {batch.size}")
    with walking(path):
        ends = path.logits(given, 0.0), path.logits(given, 1.0)
        alone, both, default = Measures(False, False), Measures(True, False), Measures(True, True, 2, forever)
        stages: dict[str, Callable[[], object]] = {
            "bare forward": lambda: bare_forward(subject, batch),
            "activation error": lambda: observe_outputs(subject, given, alone),
            "activation and propagated error": lambda: observe_outputs(subject, given, both),
            "one node of the path, both ends known": lambda: attribute(path, given, 1, forever, ends),
            "two nodes of the path, both ends known": lambda: attribute(path, given, 2, forever, ends),
            "isolated KL": lambda: observe_isolated(subject, default, given),
            "outputs, KL and one node on the path": lambda: observe(subject, default, given),
        }
        # The bare forward runs as often as the longest stage lasts: a card that is warm clocks lower.
        repeats = {"bare forward": 15}
        print(f"{'stage':48} {'seconds':>8} {'ratio':>6} {'peak GiB':>9}")
        bare, took = float("nan"), dict[str, float]()
        for name, work in stages.items():
            seconds, peak = timed(device, work, repeats.get(name, 3))
            bare = seconds if name == "bare forward" else bare
            took[name] = seconds
            print(f"{name:48} {seconds:8.3f} {seconds / bare:6.2f} {peak:9.1f}", flush=True)
        # Isolated KL is measured on half of the samples.
        whole = took["outputs, KL and one node on the path"] + took["isolated KL"] / 2
        print(
            f"{'a default scan, by batch (isolated KL of half)':48} {whole:8.3f} {whole / bare:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
