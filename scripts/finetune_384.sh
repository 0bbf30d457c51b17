#!/usr/bin/env bash
# Fine-tunes a model of scripts/imagenet.sh at 384 pixels for 30 epochs, as DeiT does.
#   bash scripts/finetune_384.sh DATA OUTPUT CHECKPOINT [main.py arguments]
# docs/training.md estimates how long it takes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh" 3 "" "$@"
data=$1 output=$2 weights=$3
shift 3
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export BATCH="${BATCH:-64}"
exec bash "$repository/scripts/imagenet.sh" "$data" "$output" --finetune "$weights" \
    --input-size 384 --epochs 30 --lr 5e-6 --unscale-lr --min-lr 5e-6 --weight-decay 1e-8 \
    --warmup-epochs 0 --format Chunk --chunk_size 64 "$@"
