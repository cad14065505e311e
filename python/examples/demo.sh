#!/usr/bin/env bash
# Real text of this machine by domain -> BPE -> tokens -> a small GPT-2 trained with scores -> a
# table of which data helped a validation batch of Python source. Run by `make demo`.
set -euo pipefail
out=${1:-demo}
mkdir -p "$out"
echo "1/4 collecting text of this machine"
python -m graddot_lm.text.demo_corpus --output "$out/corpus" --max_mb_per_domain 2
echo "2/4 training a byte-level BPE"
graddot train-tokenizer --input "$out/corpus" --vocab_size 4096 --output "$out/tokenizer.json"
echo "3/4 tokenizing by domain"
graddot tokenize --input "$out/corpus" --output "$out/tokens" --tokenizer "$out/tokenizer.json" \
    --val_fraction 0.05 --overwrite
echo "4/4 training with scores against a validation batch of Python source"
rm -rf "$out/runs/demo"
graddot train --method GradDotProd --architecture GPT2-Tiny --pile_data_dir "$out/tokens" \
    --val_set "Python source" --block_size 256 --batch_size 16 --val_batch_size 8 \
    --max_steps 300 --warmup_step 30 --learning_rate 2e-3 --eval_interval 100 --eval_iter 4 \
    --dot_prod_save_interval 50 --checkpoint_interval 100 --measure_overhead 5 \
    --results_dir "$out/runs" --run_name demo
graddot scores "$out/runs/demo"
