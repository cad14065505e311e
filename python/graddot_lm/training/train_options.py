"""The options of `graddot train`: their help, their checks, and their record in config.json.

What trains is imported once they make sense, so that nobody waits for torch to read of them.
"""

import argparse
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GraddotError
from ..text.data import TokenData, separated
from . import config
from .architectures import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn

    from ..engine import GradDotProdEngine

DTYPES = ("float32", "bfloat16", "float64")


def _domains(text: str) -> list[str] | None:
    """Comma-separated names, as `separated` reads them; None for all."""
    return None if text == "all" else [name for name in separated(text) if name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    method = parser.add_argument_group("method and model")
    method.add_argument(
        "--method",
        choices=["GradDotProd", "Regular"],
        default="GradDotProd",
        help="train with scores or without; the weights move alike (default: GradDotProd)",
    )
    method.add_argument(
        "--architecture",
        default="GPT2-Small",
        help=f"size of the model: {', '.join(ARCHITECTURES)} (default: GPT2-Small)",
    )
    method.add_argument(
        "--norms",
        action="store_true",
        help="also write each sample's gradient norm, and its cosine with the validation gradient",
    )
    method.add_argument(
        "--target_per_domain",
        action="store_true",
        help="make each domain of --val_set a target of its own, with --val_batch_size samples:"
        " every training sample gets a score for each of them",
    )
    method.add_argument("--dropout", type=float, default=0.0, help="dropout rate (default: 0)")
    method.add_argument(
        "--model_dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of the parameters (default: float32)",
    )
    method.add_argument(
        "--train_dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of the computation: bfloat16 runs under autocast, others compute in that of"
        " the parameters (default: float32)",
    )
    method.add_argument(
        "--device",
        help="device to train on (default: cuda if there is one, else cpu)",
    )
    method.add_argument(
        "--compile",
        action="store_true",
        help="train with torch.compile, which takes minutes at the start: the same weights and scores,"
        " but for rounding",
    )
    _add_data_arguments(parser.add_argument_group("data"))
    _add_step_arguments(parser.add_argument_group("steps"))
    several = parser.add_argument_group(
        "several processes",
        "Started by torchrun, processes share the batch, on one GPU each or on CPUs, and write one"
        " run in a folder that all of them see; any number of them can --resume it.",
    )
    several.add_argument(
        "--parallel",
        choices=["ddp", "fsdp"],
        default="ddp",
        help="every process holds the whole model, or a part of it (default: ddp)",
    )
    _add_run_arguments(parser.add_argument_group("run"))
    add(
        "--seed", type=int, default=42, help="seed of weights, data order and dropout (default: 42)"
    )


def _add_data_arguments(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--pile_data_dir",
        type=Path,
        default=config.PILE_DATA_DIR,
        help="folder written by `graddot tokenize` (default: $PILE_DATA_DIR or data/pile)",
    )
    data.add_argument(
        "--train_set",
        type=_domains,
        default=None,
        help="domains to train on, separated by commas, or all; a name with a comma in it, or with a"
        " double quote first, in double quotes, as '\"a, b\",c', and those in it twice (default: all)",
    )
    data.add_argument(
        "--val_set",
        type=_domains,
        default=None,
        help="domains that the validation batch and the evaluation come from (default: all)",
    )
    data.add_argument(
        "--domain_weights",
        help="draw domains by weight, as in 'code=2,math=1'; those not named are not drawn (default:"
        " by their size)",
    )
    data.add_argument(
        "--block_size",
        type=int,
        default=1024,
        help="tokens of a sample, at least 8 (default: 1024)",
    )


def _add_step_arguments(steps: argparse._ArgumentGroup) -> None:
    for name, default, text in (
        ("batch_size", 16, "training samples a step, shared by all processes"),
        ("val_batch_size", 1, "validation samples, the same in every step"),
        ("max_steps", 10000, "steps of the whole run"),
        ("warmup_step", 100, "steps of linear learning-rate warm-up"),
    ):
        steps.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    steps.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        help="parts in which a step's batch is run, one after the other, to save memory; of several"
        " the validation gradient is computed once a step, without dropout (default: 1)",
    )
    steps.add_argument(
        "--learning_rate", type=float, default=6e-4, help="peak learning rate (default: 6e-4)"
    )
    steps.add_argument(
        "--lr_schedule",
        choices=["cosine", "constant"],
        default="cosine",
        help="after the warm-up: a cosine to a tenth at max_steps, or constant (default: cosine)",
    )
    steps.add_argument(
        "--weight_decay", type=float, default=0.1, help="AdamW's, on matrices (default: 0.1)"
    )
    steps.add_argument(
        "--grad_clip",
        type=float,
        default=1.0,
        help="largest gradient norm, 0 for none (default: 1)",
    )
    steps.add_argument(
        "--on_nan",
        choices=["stop", "continue"],
        default="stop",
        help="when the loss is not finite: stop and keep what is saved, or go on (default: stop)",
    )


def _add_run_arguments(run: argparse._ArgumentGroup) -> None:
    run.add_argument(
        "--results_dir",
        type=Path,
        default=config.RESULTS_DIR,
        help="where runs are written (default: $RESULTS_DIR or results)",
    )
    run.add_argument(
        "--run_name", help="folder of this run (default: <architecture>-<method>-seed<seed>)"
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run's last checkpoint, bit for bit as if it had not stopped (with --compile"
        " but for rounding); a run that does not exist yet is started",
    )
    for name, default, text in (
        ("dot_prod_save_interval", 100, "steps between saves of the scores"),
        ("checkpoint_interval", 1000, "steps between checkpoints; the last step always has one"),
        ("eval_interval", 500, "steps between evaluations"),
        ("eval_iter", 10, "batches of an evaluation, which takes no block of the val set twice"),
        ("eval_bs", 16, "samples in a batch of an evaluation"),
        ("measure_overhead", 0, "after training, time this many steps with and without scores"),
    ):
        run.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    run.add_argument(
        "--eval_only", action="store_true", help="print the val loss (with --resume: of that run)"
    )


def run(args: argparse.Namespace) -> int:
    """`graddot train` with parsed arguments."""
    check(args)
    try:
        from . import train
    except ImportError as error:  # of what was not built, or is not there
        raise GraddotError(str(error)) from error
    return train.run(args)


def check(args: argparse.Namespace) -> None:
    """Complete the arguments; GraddotError for a value that makes no sense."""
    positive = (
        "batch_size gradient_accumulation_steps max_steps dot_prod_save_interval"
        " checkpoint_interval eval_interval eval_iter eval_bs"
    )
    least = dict.fromkeys(positive.split(), 1) | {"warmup_step": 0, "measure_overhead": 0}
    least["block_size"] = 8  # the fused head is tried on as many tokens
    for name, bound in least.items():
        value = getattr(args, name)
        if not bound <= value < 2**31:  # beyond, numbers and arrays of them overflow somewhere
            limit = f"at least {bound}" if value < bound else "below 2**31"
            raise GraddotError(f"--{name} is {value}; it must be {limit}")
    if not -(2**63) <= args.seed < 2**64:  # which torch's generators take
        raise GraddotError(f"--seed is {args.seed}; it must be from -2**63 up to 2**64 - 1")
    for name in ("learning_rate", "weight_decay", "grad_clip"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= 0):
            raise GraddotError(f"--{name} is {value}; it must be a number of at least 0")
        if value > 1e30:  # nor does Adam's step, some times the rate, fit into float32 at 1e38
            raise GraddotError(f"--{name} is {value}; it must be at most 1e30")
    for name in ("train_set", "val_set"):
        if getattr(args, name) == []:
            raise GraddotError(f"--{name} names no domain; name some, separated by commas, or all")
    if args.method == "GradDotProd" and args.val_batch_size < 1:
        raise GraddotError(
            f"--val_batch_size is {args.val_batch_size}; scores need at least one validation sample"
        )
    if not 0 <= args.dropout < 1:
        raise GraddotError(f"--dropout is {args.dropout}; it must be in [0, 1)")
    if args.architecture not in ARCHITECTURES:
        raise GraddotError(
            f"--architecture is {args.architecture!r}; it must be one of {', '.join(ARCHITECTURES)}"
        )
    for name in ("norms", "target_per_domain", "measure_overhead"):
        if getattr(args, name) and args.method != "GradDotProd":
            raise GraddotError(f"--{name} needs --method GradDotProd")
    if args.train_dtype == "float64" and args.model_dtype != "float64":
        raise GraddotError(
            f"--train_dtype float64 computes in the dtype of the parameters, {args.model_dtype}; add"
            " --model_dtype float64"
        )
    if args.run_name == "":
        raise GraddotError("--run_name is empty; it must be the name of a folder")
    if args.run_name is None:
        args.run_name = f"{args.architecture}-{args.method}-seed{args.seed}"


def _commit() -> str | None:
    """The source's git commit, if it runs from a checkout, and not from an environment that lies
    in another one."""
    here = Path(__file__)
    command = ["git", "-C", str(here.parent), "rev-parse", "HEAD", f"HEAD:./{here.name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split()[0]


def describe(
    args: argparse.Namespace,
    data: TokenData,
    model: "nn.Module",
    engine: "GradDotProdEngine | None",
    processes: int,
    val_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """What config.json records: every setting, versions, commit, and what the scores cover and are
    about."""
    import torch
    import transformers

    import graddot_kernels

    settings = {k: v for k, v in vars(args).items() if k not in ("command", "function")}
    off = dict.fromkeys(("norms", "target_per_domain", "compile"), False)
    for name, default in {**off, "gradient_accumulation_steps": 1}.items():
        if settings[name] == default:  # as in runs from before there was the option: they resume
            del settings[name]
    record: dict[str, Any] = {
        **{k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "data_dir": str(Path(args.pile_data_dir).resolve()),
        "data_fingerprint": data.fingerprint,
        "tokenizer": str((Path(args.pile_data_dir) / "tokenizer.json").resolve()),
        "tokenizer_sha256": data.meta["tokenizer"]["sha256"],
        "vocab_size": data.vocab_size,
        "processes": processes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "graddot": graddot_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": _commit(),
    }
    if engine is not None:
        record["val_sample_ids"] = list(val_ids)
        coverage = engine.coverage()
        record["coverage"] = {
            "covered": coverage.covered,
            "excluded": coverage.excluded,
            "share": coverage.share,
        }
    return record
