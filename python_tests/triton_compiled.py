"""Compile the Triton kernels for an architecture, without a GPU, and print what ptxas made of them.

    python python_tests/triton_compiled.py 90 [operation,dtype,width,rank[,rows,columns,warps,stages[,registers]] ...]

One line for each: registers of a thread, bytes of stack (spills and nothing else), shared memory of a program, and
products and sums of float32, but for those in inline assembly, that the assembler may fuse as it likes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aniso_ext.ops.triton import backward, decode, decode_backward, encode, forward, launch
from aniso_ext.ops.triton.configurations import Configuration, configuration
from aniso_ext.ops.triton.constants import PADDING, padded_blocks

KERNELS = {
    "correct": (forward.correct_kernel, {}),
    "correct_sums": (forward.correct_kernel, {"ONLY_SUMS": True, "SHIFTED": False}),
    "correct_split": (forward.correct_kernel, {"SPLIT": True}),
    "correct_leak": (forward.correct_kernel, {"SPLIT": True, "LEAK": True}),
    "encode": (encode.encode_kernel, {}),
    "decode": (decode.decode_kernel, {}),
    "correct_backward": (backward.correct_backward_kernel, {}),
    "split_backward": (backward.split_backward_kernel, {"SPLIT": True}),
    "encode_backward": (encode.encode_backward_kernel, {}),
    "decode_backward": (decode_backward.decode_backward_kernel, {}),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
FLOATS = ("per_block", "per_column", "scalars", "starts")
CASES = (*(f"{operation},bf16,1280,128" for operation in KERNELS), "correct,tf32,1280,128")


def compiled(
    kernel: Any, name: str, width: int, rank: int, choice: Configuration, architecture: int, **meta: Any
) -> Any:
    """A kernel for calibrated rows; the maps are tables with coarse cells for bfloat16 and TF32, and else searched."""
    stored = {"bf16": "bf16", "fp16": "fp16"}.get(name, "fp32")
    searched = name in ("fp16", "fp32")
    of_basis = "fp16" if name == "tf32" and "grad" not in kernel.arg_names else stored
    blocks = padded_blocks(rank // 2)
    values = {
        "WIDTH": width,
        "PADDED": -(-width // PADDING) * PADDING,
        "P": blocks,
        "BLOCKS": rank // 2,
        "CELLS": 0 if searched else 512,
        "STEPS": 4,
        "PIECES": 1025,
        "SPLIT": False,
        "LEAK": False,
        "SHIFTED": True,
        "JOINED": name == "bf16",
        "ONLY_SUMS": False,
        "FORMS": True,
        "PROJECT": True,
        "FAST": stored != "fp32",
        "PRODUCT": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[stored],
        "PRECISION": {"fp16": "fp16", "fp32": "tf32"}[of_basis] if name == "tf32" else "ieee",
        "BLOCK_ROWS": choice.block_rows,
        "BLOCK_COLUMNS": choice.block_columns,
        **meta,
    }
    signature, constants, attributes = {}, {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument], constants[argument] = "constexpr", values[argument]
            continue
        if argument.startswith("a_"):
            signature[argument] = "fp32"
        elif argument == "count" or argument.endswith("_stride"):
            signature[argument] = "i32"
        elif argument in FLOATS or (argument == "out" and values["ONLY_SUMS"]):
            signature[argument] = "*fp32"
        elif argument in ("table", "buckets"):
            signature[argument] = "*i32" if argument == "table" else "*i16"
        elif argument.endswith(("project", "rebuild")):
            signature[argument] = f"*{of_basis}"
        else:
            signature[argument] = "*i64" if argument == "pieces" else f"*{stored}"
        if argument != "count" and signature[argument] != "fp32":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=launch.options(choice, DTYPES[name]))


def resources(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr).groups()
    return int(registers), int(stack)


def main(architecture: int, cases: tuple[str, ...]) -> None:
    for case in cases:
        operation, name, width, rank, *shape = case.split(",")
        kernel, meta = KERNELS[operation]
        choice = configuration(operation, DTYPES[name], int(width), int(rank), architecture, tf32=name == "tf32")
        if shape:
            choice = Configuration(*(int(value) for value in shape))
        made = compiled(kernel, name, int(width), int(rank), choice, architecture, **meta)
        registers, stack = resources(made.asm["cubin"])
        written = re.sub(r"// begin inline asm.*?// end inline asm", "", made.asm["ptx"], flags=re.DOTALL)
        fusible = len(re.findall(r"\b(?:mul|add|sub)\.f32", written))
        used = f"registers {registers} stack {stack} shared {made.metadata.shared} fusible {fusible}"
        print(f"{case} {used} {tuple(choice)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), tuple(sys.argv[2:]) or CASES)
