#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The real torchrun starts a program of ours: through the store that its agent
# serves, and, as with older versions, through one of rank 0's own.
set -euo pipefail
python=$1
program=$2

# Fails unless both ranks have printed what they agree on.
expect_probe() {
  local output=$1 agent=$2
  for rank in 0 1; do
    if ! grep -q "probe: torchrun rank $rank of 2, agent store $agent, sum 3" <<<"$output"; then
      echo "rank $rank did not print what was expected (agent store $agent):"
      echo "$output"
      exit 1
    fi
  done
}

torchrun=("$python" -m torch.distributed.run --nproc_per_node=2 --no-python)

expect_probe "$("${torchrun[@]}" --standalone "$program" 2>&1)" on

# The agent's store is at a port that it chose, and torchrun tells the ranks to
# serve their own: at another port then, since MASTER_PORT is taken. One that
# the kernel gives to nobody who asks for any.
port=$((15000 + RANDOM % 15000))
expect_probe "$("${torchrun[@]}" --standalone bash -c '
  export TORCHELASTIC_USE_AGENT_STORE=False
  export MASTER_PORT=$1
  exec "$0"' "$program" "$port" 2>&1)" off
echo "torchrun works"
