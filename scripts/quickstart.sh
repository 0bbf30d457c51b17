#!/usr/bin/env bash
# Trains a small LION-S with snake curves on 10,000 real images, then scores it in every format.
#   bash scripts/quickstart.sh [output folder, default outputs/quickstart, where it replaces itself]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh" 0 1 "$@"
overwrite=()
[ $# -gt 0 ] || overwrite=(--overwrite)
output=$(realpath -m "${1:-outputs/quickstart}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

model=(--model lion_tiny_patch16_224 --mask_type Selective --order S --pos_emb --data-set DEMO
    --input-size 28 --model-kwargs patch_size=4 depth=2 embed_dim=96 num_heads=3)
recipe=(--epochs 10 --batch-size 50 --lr 3e-3 --unscale-lr --sched-on-updates --warmup-epochs 1
    --clip-grad 1 --drop-path 0 --no-aug --mixup 0 --cutmix 0 --no-repeated-aug
    --model-ema-decay 0.99 --num_workers 1)

python main.py "${model[@]}" "${recipe[@]}" --output_dir "$output" "${overwrite[@]}"
python scripts/plot_log.py "$output/log.txt" --output "$output/curves.png"
echo "The same checkpoint in every format:"
python scripts/score_formats.py "${model[@]}" --resume "$output/checkpoint.pth" --num_workers 0
