#!/usr/bin/env bash
# Trains the checkpoint in demo/: a small LION-S with snake curves, on the 10,000 images of DEMO.
#   bash scripts/demo_checkpoint.sh OUTPUT [main.py arguments]
# Minutes on a GPU (add --torchcompile), hours on a CPU. Run it again to go on after an interruption.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh" 1 "" "$@"
output=$1
shift
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec python3 "$repository/main.py" --output_dir "$output" --resume auto --data-set DEMO \
    --model lion_tiny_patch16_224 --mask_type Selective --order S --pos_emb \
    --decay-init multiscale --input-size 28 \
    --model-kwargs patch_size=2 embed_dim=96 depth=6 num_heads=3 \
    --epochs 250 --batch-size 512 --lr 2e-3 --unscale-lr --sched-on-updates --warmup-epochs 15 \
    --drop-path 0.1 --aa none --color-jitter 0 --mixup 0.8 --cutmix 1.0 --no-repeated-aug \
    --no-model-ema --eval-interval 50 --cache --num_workers 2 "$@"
