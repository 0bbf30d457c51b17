#!/usr/bin/env bash
# Does a teacher help? Trains RegNetY-200MF on CIFAR-10 and then, for three seeds, a tiny LION-D with
# snake curves (64 px, patch 8, depth 6) without it, with hard and with soft distillation from it.
#   bash scripts/distill_cifar10.sh DATA OUTPUT [main.py arguments for every run]
# DATA as in cifar10.sh. GPUS=2 JOBS=3 SEEDS="0 1 2" by default, with JOBS students at a time on the
# same GPUs; run it again to go on after an interruption.
set -euo pipefail
data=$1 output=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

common=(--data-path "$data" --input-size 64 --batch-size $((512 / ${GPUS:=2})) --lr 2e-3
    --warmup-epochs 2 --sched-on-updates --drop-path 0 --no-model-ema --no-repeated-aug
    --aa none --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --resume auto)
train() {
    torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node="$GPUS" main.py "${common[@]}" "$@"
}

train --output_dir "$output/teacher" --model regnety_002 --epochs 30 --smoothing 0 "$@"
for seed in ${SEEDS:-0 1 2}; do
    for kind in none hard soft; do
        [ "$(jobs -pr | wc -l)" -lt "${JOBS:-3}" ] || wait -n
        train --output_dir "$output/$kind-$seed" --seed "$seed" --epochs 15 \
            --model lion_tiny_patch16_224 --model-kwargs patch_size=8 depth=6 --order S \
            --distillation-type "$kind" --distillation-tau 3 --teacher-model regnety_002 \
            --teacher-path "$output/teacher/checkpoint.pth" "$@" &
    done
done
for job in $(jobs -p); do wait "$job"; done

python3 - "$output" << 'EOF'
import json, statistics, sys
from pathlib import Path

for kind in ("teacher", "none", "hard", "soft"):
    logs = sorted(Path(sys.argv[1]).glob(f"{kind}*/log.txt"))
    top1 = [json.loads(log.read_text().splitlines()[-1])["test_acc1"] for log in logs]
    print(f"{kind}: {statistics.mean(top1):.2f}  ({', '.join(f'{value:.2f}' for value in top1)})")
EOF
