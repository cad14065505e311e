"""`make bench-selection`: whether training on what scored best is better than on a random choice.

    python bench/bench_selection.py [--seeds 3]

python/examples/hf_trainer.py by seed: how many of the third of its lines with the highest summed values
are of the validation set's kind, as a third of all are; and the loss on other lines of that kind after
training anew on that third, and on a random one.

Last line: the smallest share of that kind, and the largest ratio of the two losses.
"""

import argparse
import sys
import tempfile

from _report import ROOT, append_row

sys.path.insert(0, str(ROOT / "python" / "examples"))
import hf_trainer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs, of seeds 0, 1, ...")
    args = parser.parse_args()
    shares, ratios = [], []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            figures = hf_trainer.main(["--output_dir", folder, "--seed", str(seed)])
        append_row("selection", {"seed": seed, **figures})
        shares.append(figures["additions_chosen"])
        ratios.append(figures["loss_best"] / figures["loss_random"])
    print(f"additions_chosen={min(shares):.3f} best_over_random={max(ratios):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
