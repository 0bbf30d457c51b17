#!/usr/bin/env bash
# Hard distillation on ImageNet from RegNetY-16GF, as DeiT does.
#   bash scripts/distill.sh DATA OUTPUT TEACHER [main.py arguments]
# TEACHER is a checkpoint of regnety_160 (file or URL), or timm: for timm's weights.
# docs/training.md estimates how long it takes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh" 3 "" "$@"
data=$1 output=$2 teacher=$3
shift 3
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec bash "$repository/scripts/imagenet.sh" "$data" "$output" --model lion_small_distilled_patch16_224 \
    --distillation-type hard --teacher-model regnety_160 --teacher-path "$teacher" "$@"
