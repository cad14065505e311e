"""Compile every Triton kernel and tile row ahead of time, with no GPU, and print what came out.

    python bench/aot.py [--targets sm_90 ...] [--only gram]

A row is one kernel variant on one target: registers, spilled bytes, shared memory, the matrix
instruction in its assembly. Exits non-zero when a hot kernel spills on sm_90, when a bf16 matrix
kernel has no wgmma there, waits for each or loads over what one reads, when such a kernel loads
single elements or, before sm_100, an operand into registers, or when any needs more shared memory
than its target has. Results are cached by source under build/triton-aot.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_DIR", "build/triton-aot")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graddot_kernels.triton_kernels import (
    cross_entropy,
    linear_direction,
    linear_gram,
    linear_wgrad,
    norm,
)
from graddot_kernels.triton_kernels.config import Tile, tile_for

# name: (Triton's target, row of the tile tables, bytes of shared memory a program may have)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "sm_80", 163 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), "small", 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), "sm_90", 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), "sm_100", 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "gfx942", 64 * 1024),
}
DTYPES = {"bf16": ("bf16", "half"), "fp32": ("fp32", "fp32"), "tf32": ("fp32", "tf32")}
MATRIX = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Case:
    """One variant of one kernel: its compile-time arguments and the dtypes of its pointers."""

    name: str
    kernel: Any
    op: str
    constants: dict[str, Any]
    direction: str = ""  # dtype of the direction if not the activations'
    unit: tuple[str, ...] = ()  # strides that are 1
    dtypes: tuple[str, ...] = ("bf16", "fp32", "tf32")
    tma: bool = False
    hot: bool = True


def _wgrad(name: str, direction: str = "", **constants: Any) -> Case:
    base = {"RESIDENT": True, "SCALE": False, "ACCUMULATE": False, "TMA": False}
    base |= {"NORMS": False, "PADDED": False}
    tma = bool(constants.get("TMA"))
    plain = not direction and constants.keys() <= {"RESIDENT"}
    unit = ("grad_sd", "act_sd", "dir_si", "out_si")
    dtypes = DTYPES if plain else ("bf16",)
    merged = base | constants
    kernel = linear_wgrad.wgrad_kernel
    return Case(f"wgrad{name}", kernel, "wgrad", merged, direction, unit, tuple(dtypes), tma)


def cases() -> list[Case]:
    gram = linear_gram.gram_kernel
    acts = ("va_sd", "vg_sd", "a_sd", "g_sd")
    sides = ("x_sd", "y_sd")
    direction = linear_direction.direction_kernel
    return [
        _wgrad(""),
        _wgrad(" fp32 D", "fp32"),
        _wgrad(" K", RESIDENT=False),
        _wgrad(" K fp32 D", "fp32", RESIDENT=False),
        _wgrad(" scale add", "fp32", SCALE=True, ACCUMULATE=True),
        _wgrad(" vocab", "fp32", PADDED=True),
        _wgrad(" norms", "fp32", NORMS=True),
        replace(_wgrad(" K norms", "fp32", RESIDENT=False, NORMS=True), hot=False),
        _wgrad(" tma", TMA=True),
        _wgrad(" tma norms", "fp32", TMA=True, NORMS=True),
        _wgrad(" tma fp32 D", "fp32", TMA=True),
        Case("gram", gram, "gram", {"TMA": False}, unit=acts),
        Case("gram short", gram, "gram", {"TMA": False, "short": True}, unit=acts, hot=False),
        Case("gram tma", gram, "gram", {"TMA": True}, unit=acts, dtypes=("bf16",), tma=True),
        Case("direction", direction, "direction", {}, unit=(*sides, "dir_sx")),
        Case("direction t", direction, "direction", {}, unit=(*sides, "dir_sy"), dtypes=("bf16",)),
        Case("norm", norm.norm_kernel, "norm", {"MEAN": False, "RSTD": False},
             unit=("x_sd", "grad_sd"), hot=False, dtypes=("bf16", "fp32")),
        Case("norm mean rstd", norm.norm_kernel, "norm", {"MEAN": True, "RSTD": True},
             unit=("x_sd", "grad_sd"), hot=False, dtypes=("bf16", "fp32")),
        Case("cross entropy", cross_entropy.cross_entropy_kernel, "cross_entropy", {},
             dtypes=("bf16", "fp32")),
        Case("combine", linear_wgrad.combine_kernel, "norm",
             {"SCALE": True, "ACCUMULATE": True}, unit=("out_si",), hot=False, dtypes=("fp32",)),
    ]  # fmt: skip


def constants_of(case: Case, tile: Tile, dtype: str) -> dict[str, Any]:
    """The kernel's compile-time arguments under a tile, as its launcher would pass them."""
    named: dict[str, Any] = {
        "wgrad": {"BO": tile.rows, "BI": tile.cols, "BT": tile.depth, "SLICES": tile.slices},
        "gram": {"BS": tile.rows, "BT": tile.cols, "BK": tile.depth},
        "direction": {"BM": tile.rows, "BN": tile.cols, "BK": tile.depth, "SLICES": tile.slices},
        "norm": {"BT": tile.rows, "BO": tile.rows, "BD": tile.cols, "BI": tile.cols},
        "cross_entropy": {"BV": tile.cols, "GROUP": 8 if dtype == "bf16" else 4},
    }[case.op]
    short = "short" in case.constants
    named |= {"PS": 16 if short else tile.rows, "PT": 16 if short else tile.cols}
    named |= {"BAND": 8, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    named |= case.constants | dict.fromkeys(case.unit, 1)
    if case.op == "wgrad":
        width = 4 if (case.direction or DTYPES[dtype][0]) == "fp32" else 2
        named["RESIDENT"] = named["RESIDENT"] and width <= tile.resident
    return {name: value for name, value in named.items() if name in case.kernel.arg_names}


def source(case: Case, tile: Tile, dtype: str) -> ASTSource:
    """The kernel with GPT-2's divisibility: pointers, widths and strides multiples of 16, but for
    the vocabulary."""
    element = DTYPES[dtype][0]
    constants = constants_of(case, tile, dtype)
    blocks = {"p_grad": tile.rows, "p_act": tile.cols}
    if case.op == "gram":
        blocks = {"p_val_act": tile.rows, "p_val_grad": tile.rows}
        blocks |= {"p_act": tile.cols, "p_grad": tile.cols}
    fp32 = {"p_out", "p_dots", "p_parts", "p_weight", "p_losses"}
    fp32 |= {"p_mean", "p_rstd"}
    scalars = {"smoothing": "fp32", "z_loss": "fp32", "p_labels": "*i64", "p_scale": "*fp64"}
    signature, attributes = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif case.tma and name in blocks:
            shape = (blocks[name], tile.depth) if case.op == "gram" else (tile.depth, blocks[name])
            signature[name] = f"tensordesc<{element}[1, {shape[0]}, {shape[1]}]>"
        else:
            pointee = "fp32" if name in fp32 else element
            if name == "p_direction" and case.direction:
                pointee = case.direction
            plain = f"*{pointee}" if name.startswith("p_") else "i32"
            signature[name] = scalars.get(name, plain)
            odd = name == "d_out" and constants.get("PADDED")
            even = name.startswith(("p_", "d_")) or name in ("t", "d", "stride")
            if not odd and (even or re.search("_s[a-z]$", name)):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(case.kernel, signature, constants, attributes)


def cuobjdump(compiled: Any, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(compiled: Any, backend: str) -> tuple[int, int]:
    """(registers, spilled bytes) of the machine code."""
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
        spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    else:
        text = cuobjdump(compiled, "-res-usage")
        registers, spills = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or spills is None:
        raise RuntimeError(f"no resource usage found in:\n{text[:2000]}")
    return int(registers[1]), int(spills[1])


def pipeline_problem(compiled: Any, operands: int, stages: int, wgmma: bool) -> str:
    """What is wrong with the order of loads and products in a matrix kernel, or nothing.

    Each operand of a product has tiles in shared memory, so many that loads run ahead; where Triton
    does not see how, it loads into registers. wgmma reads its tiles while the program goes on, so
    that there is one more of each: as many as stages. Triton forgets that one where the loaded tile
    has a second use. And the machine code waits for all products but the last so many: where ptxas
    found it unsafe to let any be in flight, it waits for none to be left each time.
    """
    buffer = r"local_alloc[^\n]*memdesc<(\d+)x\d+x\d+x\w+, [^\n]*mutable>"
    tiles = [int(n) for n in re.findall(buffer, compiled.asm["ttgir"])]
    if len(tiles) < operands:
        return "loads into registers"
    if not wgmma:
        return ""
    if min(tiles) < stages:
        return "loads over what wgmma reads"
    waits = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x[1-9]", cuobjdump(compiled, "-sass"))
    return "" if waits else "waits for every wgmma"


def compile_one(job: tuple[int, str, str]) -> dict[str, Any]:
    i_case, target_name, dtype = job
    case = cases()[i_case]
    target, arch, shared_limit = TARGETS[target_name]
    tile = tile_for(case.op, arch, DTYPES[dtype][1])
    if case.name == "combine":
        tile = replace(tile, rows=32, cols=128, warps=4)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source(case, tile, dtype), target=target, options=options)
    registers, spilled = resources(compiled, target.backend)
    assembly = compiled.asm["amdgcn" if target.backend == "hip" else "ptx"]
    must_wgmma = dtype == "bf16" and case.op not in ("norm", "cross_entropy")
    problem = ""
    if compiled.metadata.shared > shared_limit:
        problem = "too much shared memory"
    elif must_wgmma and re.search(r"ld\.global\S*\.[bu]16\b", assembly):
        problem = "loads single elements"
    elif must_wgmma and target_name in ("sm_80", "sm_89", "sm_90"):
        operands, wgmma = 4 if case.op == "gram" else 2, target_name == "sm_90"
        problem = pipeline_problem(compiled, operands, tile.stages, wgmma)
    return {
        "kernel": case.name, "target": target_name, "dtype": dtype,
        "tile": f"{tile.rows}x{tile.cols}x{tile.depth}/{tile.warps}w{tile.stages}s",
        "registers": registers, "spilled": spilled, "shared": compiled.metadata.shared,
        "matrix": next((name for name in MATRIX if name in assembly), "-"),
        "problem": problem,
        "hot": case.hot, "must_wgmma": must_wgmma,
    }  # fmt: skip


def jobs(targets: list[str], only: str) -> list[tuple[int, str, str]]:
    out = []
    for target in targets:
        for i, case in enumerate(cases()):
            if case.tma and target not in ("sm_90", "sm_100") or only not in ("", case.name):
                continue
            # AMD's matrix units take fp32 as it is: no tf32 kind there.
            kinds = [d for d in case.dtypes if not (d == "tf32" and target == "gfx942")]
            out += [(i, target, dtype) for dtype in kinds]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--only", default="", help="one kernel variant, by the table's name")
    args = parser.parse_args()
    columns = ("kernel", "target", "dtype", "tile", "registers", "spilled", "shared", "matrix")
    widths = (22, 8, 6, 18, 10, 8, 8, 12)
    print("".join(f"{name:<{w}}" for name, w in zip(columns, widths, strict=True)))
    rows = []
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        for row in pool.imap(compile_one, jobs(args.targets, args.only)):
            rows.append(row)
            line = "".join(f"{row[c]!s:<{w}}" for c, w in zip(columns, widths, strict=True))
            print(f"{line}  {row['problem']}".rstrip(), flush=True)
    hopper = [row for row in rows if row["target"] == "sm_90"]
    without = [row for row in hopper if row["must_wgmma"] and row["matrix"] != "wgmma"]
    hot_spills = [row for row in hopper if row["hot"] and row["spilled"]]
    spilled = sum(row["spilled"] > 0 for row in rows)
    print(f"kernels={len(rows)} targets={len(args.targets)} spilled={spilled} "
          f"without_wgmma={len(without)}")  # fmt: skip
    return 1 if without or hot_spills or any(row["problem"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
