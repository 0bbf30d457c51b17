#!/usr/bin/env bash
# Does a teacher help? Trains RegNetY-200MF on CIFAR-10 and then, for three seeds, a tiny LION-Lit
# (64 px, patch 8, depth 6) without it, with hard and with soft distillation from it.
#   bash scripts/distill_cifar10.sh DATA OUTPUT [main.py arguments for every run]
# DATA as in cifar10.sh. GPUS=1 train the teacher for TEACHER_EPOCHS, then JOBS=9 students at a time,
# each on one of them, for EPOCHS; SEEDS="1 2 3"; CORES=$(nproc) load the images. TEACHER=FILE is a
# checkpoint to use instead of training one. Run it again to go on after an interruption.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh" 2 "" "$@"
data=$1 output=$2
shift 2
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# DeiT's crops; its mixup and cutmix (the defaults) for the students alone.
options=(--data-path "$data" --input-size 64 --sched-on-updates --drop-path 0 --no-model-ema
    --no-repeated-aug --resume auto --eval-crop-ratio 1 --aa none --color-jitter 0 --reprob 0)

gpus=${GPUS:-1} jobs=${JOBS:-9} cores=${CORES:-$(nproc)}
IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
teacher=${TEACHER:-$output/teacher/checkpoint.pth}
if [ -z "${TEACHER:-}" ]; then
    torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node="$gpus" \
        "$repository/main.py" "${options[@]}" --output_dir "$output/teacher" \
        --num_workers $((cores / gpus)) --model regnety_002 \
        --batch-size $((512 / gpus)) --epochs "${TEACHER_EPOCHS:-36}" \
        --lr 4e-3 --warmup-epochs 2 --smoothing 0 --mixup 0 --cutmix 0 "$@"
fi

run=0 failed=0
declare -A alpha=([none]=0.5 [hard]=0.5 [soft]=0.9)
for seed in ${SEEDS:-1 2 3}; do
    for kind in none hard soft; do
        [ "$(jobs -pr | wc -l)" -lt "$jobs" ] || wait -n || failed=1
        CUDA_VISIBLE_DEVICES=${devices[run++ % gpus]} python3 "$repository/main.py" "${options[@]}" \
            --output_dir "$output/$kind-$seed" --seed "$seed" --num_workers $((cores / jobs)) \
            --batch-size 256 --epochs "${EPOCHS:-18}" --lr 2e-3 --warmup-epochs 1 \
            --model lion_tiny_patch16_224 --model-kwargs patch_size=8 depth=6 \
            --mask_type Lit --pos_emb --distillation-type "$kind" --distillation-tau 3 \
            --distillation-alpha "${alpha[$kind]}" \
            --teacher-model regnety_002 --teacher-path "$teacher" "$@" &
    done
done
for job in $(jobs -p); do wait "$job" || failed=1; done

python3 - "$output" << 'EOF'
import json, statistics, sys
from pathlib import Path

for kind in ("teacher", "none", "hard", "soft"):
    logs = sorted(Path(sys.argv[1]).glob(f"{kind}*/log.txt"))
    top1 = [json.loads(log.read_text().splitlines()[-1])["test_acc1"] for log in logs]
    if top1:
        print(f"{kind}: {statistics.mean(top1):.2f}  ({', '.join(f'{x:.2f}' for x in top1)})")
EOF
exit $failed
