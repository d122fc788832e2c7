#!/usr/bin/env bash
# Train on several hosts with DeepSpeed's launcher. HOSTFILE has a line "NAME slots=RANKS" for each host.
#
#   HOSTFILE=hosts MASTER=h1 examples/launch/deepspeed.sh --train_data photos/ --output /shared/run …
#       starts all ranks from here: over ssh (with pdsh), without a password
#   HOSTFILE=hosts MASTER=h1 NODE_RANK=0 examples/launch/deepspeed.sh --train_data photos/ …
#       without ssh: start it on every host, with its own NODE_RANK
#
# The launcher hands on few variables. Others, such as GLOO_SOCKET_IFNAME, go into a file .deepspeed_env, a
# NAME=VALUE a line, in the folder where this is started. Options for ssh go into PDSH_SSH_ARGS_APPEND.
set -euo pipefail
deepspeed=$(dirname "$(command -v "${PYTHON:-python}")")/deepspeed
where=(--hostfile "$HOSTFILE" --master_addr "$MASTER" --master_port "${PORT:-29500}")
if [ -n "${NODE_RANK:-}" ]; then
  where+=(--no_ssh --node_rank "$NODE_RANK")
else
  where+=(--force_multi --no_ssh_check)
fi
exec "$deepspeed" "${where[@]}" --module tracer finetune "$@"
