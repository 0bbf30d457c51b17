#!/usr/bin/env bash
# ImageNet from scratch: LION-S with snake curves, DeiT's recipe (effective batch 1024, 300 epochs).
#   bash scripts/imagenet.sh DATA OUTPUT [main.py arguments]
# GPUS=4 BATCH=256 are the defaults; run it again to go on after an interruption.
# docs/training.md estimates how long it takes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh" 2 "" "$@"
data=$1 output=$2
shift 2
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Slurm can be asked to send SIGUSR1 or SIGUSR2 before a time limit.
exec torchrun --nproc_per_node="${GPUS:-4}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    "$repository/main.py" --data-path "$data" --output_dir "$output" \
    --model lion_base_patch16_224 --mask_type Selective --order S --batch-size "${BATCH:-256}" \
    --torchcompile --resume auto "$@"
