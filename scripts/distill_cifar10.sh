#!/usr/bin/env bash
# Does a teacher help? Trains RegNetY-200MF on CIFAR-10 and then, for three seeds, a tiny LION-D with
# snake curves (64 px, patch 8, depth 6) without it, with hard and with soft distillation from it.
#   bash scripts/distill_cifar10.sh DATA OUTPUT [main.py arguments for every run]
# DATA as in cifar10.sh. GPUS=2 train the teacher together, then JOBS=9 students at a time, each on
# one of them; SEEDS="0 1 2". TEACHER=FILE is a checkpoint to use instead of training one. Run it
# again to go on after an interruption.
set -euo pipefail
data=$1 output=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

options=(--data-path "$data" --input-size 64 --batch-size 512 --lr 2e-3 --warmup-epochs 2
    --sched-on-updates --drop-path 0 --no-model-ema --no-repeated-aug --resume auto
    --aa none --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0)

gpus=${GPUS:-2}
IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
teacher=${TEACHER:-$output/teacher/checkpoint.pth}
if [ -z "${TEACHER:-}" ]; then
    torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node="$gpus" main.py "${options[@]}" \
        --output_dir "$output/teacher" --model regnety_002 --batch-size $((512 / gpus)) \
        --epochs 30 --smoothing 0 "$@"
fi

run=0
for seed in ${SEEDS:-0 1 2}; do
    for kind in none hard soft; do
        [ "$(jobs -pr | wc -l)" -lt "${JOBS:-9}" ] || wait -n
        CUDA_VISIBLE_DEVICES=${devices[run++ % gpus]} python3 main.py "${options[@]}" \
            --output_dir "$output/$kind-$seed" --seed "$seed" --epochs 16 --num_workers 4 \
            --model lion_tiny_patch16_224 --model-kwargs patch_size=8 depth=6 --order S \
            --distillation-type "$kind" --distillation-tau 3 \
            --teacher-model regnety_002 --teacher-path "$teacher" "$@" &
    done
done
for job in $(jobs -p); do wait "$job"; done

python3 - "$output" << 'EOF'
import json, statistics, sys
from pathlib import Path

for kind in ("teacher", "none", "hard", "soft"):
    logs = sorted(Path(sys.argv[1]).glob(f"{kind}*/log.txt"))
    top1 = [json.loads(log.read_text().splitlines()[-1])["test_acc1"] for log in logs]
    if top1:
        print(f"{kind}: {statistics.mean(top1):.2f}  ({', '.join(f'{x:.2f}' for x in top1)})")
EOF
