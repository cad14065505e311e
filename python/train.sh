#!/usr/bin/env bash
# Train GPT-2: all flags go to `graddot train` (see `graddot train --help`). For example:
#   python/train.sh --method GradDotProd --architecture GPT2-Small --batch_size 16 \
#       --val_batch_size 1 --train_set all --val_set "Python source" --max_steps 1000
set -euo pipefail
exec graddot train "$@"
