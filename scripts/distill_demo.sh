#!/usr/bin/env bash
# Does distillation help? A small RegNet learns DEMO, then teaches a small LION-Lit, over two
# processes; three seeds without, with hard and with soft distillation, at the same budget.
#   bash scripts/distill_demo.sh [output folder]
set -euo pipefail
output=$(realpath -m "${1:-outputs/distill_demo}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipe=(--data-set DEMO --input-size 28 --batch-size 24 --unscale-lr --sched-on-updates --clip-grad 1
    --drop-path 0 --no-aug --no-repeated-aug --no-model-ema --num_workers 0)
student=(--model lion_tiny_patch16_224 --mask_type Lit --pos_emb --epochs 4
    --warmup-epochs 1 --lr 3e-3 --model-kwargs patch_size=4 depth=2 embed_dim=64 num_heads=2)

train() {
    torchrun --nproc_per_node=2 main.py "${recipe[@]}" --overwrite "$@" > "$output/last_run.txt"
    grep "Max accuracy" "$output/last_run.txt" | tail -n 1
}

mkdir -p "$output"
echo -n "teacher regnety_002: "
train --model regnety_002 --epochs 6 --warmup-epochs 1 --lr 2e-3 --mixup 0 --cutmix 0 \
    --output_dir "$output/teacher"
for seed in 0 1 2; do
    for kind in none hard soft; do
        echo -n "student, distillation $kind, seed $seed: "
        train "${student[@]}" --seed "$seed" --output_dir "$output/$kind$seed" \
            --distillation-type "$kind" --distillation-tau 3 --teacher-model regnety_002 \
            --teacher-path "$output/teacher/best_checkpoint.pth"
    done
done
