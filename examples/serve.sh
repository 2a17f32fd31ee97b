#!/bin/sh
# An OpenAI-compatible server with kvoffload: examples/serve.sh MODEL [further arguments of vllm serve]
# Needs vLLM and `pip install kvoffload` in the same environment.
set -eu

model=${1:?usage: examples/serve.sh MODEL [further arguments of vllm serve]}
shift

# 8 GiB of host memory for blocks; every other setting has a default: `kvoffload config` lists them.
exec vllm serve "$model" \
  --kv-transfer-config '{
    "kv_connector": "KVOffloadConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"l1": {"capacity_gb": 8}}
  }' \
  "$@"
