#!/usr/bin/env bash
# Trains a tiny model (patch 4, 32 px) on CIFAR-10 for 24 epochs with crop, flip and label smoothing.
#   bash scripts/cifar10.sh DATA OUTPUT [main.py arguments]
# DATA holds train/CLASS/*.jpg|png and test/CLASS/*.jpg|png.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh" 2 "" "$@"
data=$1 output=$2
shift 2
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec python3 "$repository/main.py" --data-path "$data" --output_dir "$output" \
    --model lion_tiny_patch16_224 --input-size 32 --model-kwargs patch_size=4 \
    --epochs 24 --batch-size 256 --lr 1.5e-3 --warmup-epochs 2 --sched-on-updates --drop-path 0.05 \
    --aa none --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --no-repeated-aug \
    --model-ema-decay 0.998 "$@"
