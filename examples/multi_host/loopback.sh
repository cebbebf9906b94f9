#!/usr/bin/env bash
# Two processes of one machine as if they were two hosts, each with 4 simulated devices. In one terminal:
#     examples/multi_host/loopback.sh 0 CKPT
# and in another the same with 1. More arguments go to `gptoss-jax generate`; PORT chooses another port.
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[01]$ ]]; then
    echo "usage: $0 0|1 CKPT [arguments of gptoss-jax generate]" >&2
    exit 2
fi
process_id=$1 checkpoint=$2
shift 2
exec gptoss-jax generate "$checkpoint" "Two hosts, one model:" \
    --mesh data=1,expert=4,tensor=2 --host-devices 4 \
    --coordinator "127.0.0.1:${PORT:-8476}" --num-processes 2 --process-id "$process_id" "$@"
