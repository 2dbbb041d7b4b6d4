"""AutoRound's AutoScheme: which linears it leaves in 16-bit beside int4, by average bits."""

from __future__ import annotations

import json
import os
from typing import Any

from tests.benchmarks.peers.workers.exchange import hand_back_lists, linears, measured, read_job

INT4_BITS, FULL_BITS, GROUP = 4.3125, 16.0, 64


def main() -> None:
    """Choose and hand back."""
    job = read_job()
    os.environ["AR_AUTO_SCHEME_CACHE"] = str(job.out)  # else a second run reads the scores of the first
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoTokenizer

    model, tokenizer = job.load(), AutoTokenizer.from_pretrained(job.model)
    passages = job.out / "passages.jsonl"
    passages.write_text("\n".join(json.dumps({"text": tokenizer.decode(row)}) for row in job.rows))
    targets = {share: INT4_BITS + share * (FULL_BITS - INT4_BITS) for share in job.options["shares"]}
    four_bit = QuantizationScheme(bits=4, group_size=GROUP, sym=False, data_type="int", act_bits=16)
    names = list(linears(model))
    with measured(job.device) as cost:
        found: dict[float, dict[str, Any]] = GenScheme(
            AutoScheme(
                avg_bits=list(targets.values()),
                options=[four_bit, "BF16"],
                nsamples=len(job.rows),
                seqlen=job.cropped().shape[1],
                batch_size=8,
            ),
            model,
            names,
            {},
            dataset=str(passages),
            device_map=0 if job.device.startswith("cuda") else "cpu",
            tokenizer=tokenizer,
            enable_torch_compile=False,
        ).get_layer_config()
    lists = {
        str(share): [name for name in names if found[bits].get(name, {}).get("bits") == FULL_BITS]
        for share, bits in targets.items()
    }
    hand_back_lists(job, "AutoRound AutoScheme", lists, cost, "auto-round")


if __name__ == "__main__":
    main()
