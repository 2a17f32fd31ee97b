"""kvoffload with vLLM's offline `LLM`: a later answer starts from host memory although vLLM's own cache is empty.

python examples/offline_vllm.py MODEL
"""

from __future__ import annotations

import sys
import time

from vllm.config import KVTransferConfig

from vllm import LLM, SamplingParams


def main(model: str) -> None:
    llm = LLM(
        model=model,
        # This argument is all that kvoffload needs.
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVOffloadConnector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"l1": {"capacity_gb": 1}},
        ),
    )
    prompt = "the quick brown fox jumps over the lazy dog and " * 150
    parameters = SamplingParams(max_tokens=8, temperature=0.0)

    for attempt in range(1, 4):
        begun = time.perf_counter()
        (output,) = llm.generate([prompt], parameters, use_tqdm=False)
        seconds = time.perf_counter() - begun
        print(f"{attempt}: {seconds:.2f} s, {output.num_cached_tokens} of {len(output.prompt_token_ids)} tokens from a cache")
        print(f"    {output.outputs[0].text!r}")
        # A save takes a moment, and so does L1's start: what was computed right after vLLM's may not have been kept.
        time.sleep(2)
        # vLLM forgets; kvoffload does not (reset_prefix_cache(reset_connector=True) would empty L1 too).
        llm.reset_prefix_cache()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
