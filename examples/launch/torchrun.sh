#!/usr/bin/env bash
# Train on several hosts with torchrun: start this on every host, with the same options and its own NODE_RANK.
#
#   NODE_RANK=0 HOSTS=2 RANKS=8 MASTER=h1 examples/launch/torchrun.sh --train_data photos/ --output /shared/run …
#   NODE_RANK=1 HOSTS=2 RANKS=8 MASTER=h1 examples/launch/torchrun.sh --train_data photos/ --output /shared/run …
#
# RANKS is the number of ranks, one a GPU, on each host. The output lies in a folder that all hosts share.
set -euo pipefail
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${HOSTS:-1}" --nproc-per-node "${RANKS:-1}" --node-rank "${NODE_RANK:-0}" \
  --master-addr "${MASTER:-127.0.0.1}" --master-port "${PORT:-29500}" \
  -m tracer finetune "$@"
