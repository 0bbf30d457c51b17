"""Compiles every kernel for Hopper; needs Triton, but no GPU."""

import sys
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels.blocks import backward_kernel, forward_kernel
from kernels.ops import chunk_size, precision

SHARED_MEMORY = 227 * 1024  # bytes that one block can have
IN_QKV_DTYPE = ("QKV", "STATES", "OUT", "DOUT", "DQKV")
FLOATS = ("X", "Y", "VECTORS", "R", "FLUX")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compile_kernel(kernel, dtype, dim, lit):
    qkv = torch.empty(1, 1, 3, 1, dim, dtype=DTYPES[dtype], device="meta")
    constants = {
        "D": dim, "BLOCK": chunk_size(qkv), "LIT": lit,
        "DECAY": not lit, "CURVED": not lit, "ADD": not lit, "WEIGHT": 1.0, "NORMALISE": True,
        "PRECISION": precision(qkv),
    }  # fmt: skip
    types = {"CURVE": "*i64", "eps": "fp32", "scale": "fp32"}
    types |= {name: f"*{dtype}" for name in IN_QKV_DTYPE} | {name: "*fp32" for name in FLOATS}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, t in enumerate(signature.values()) if t.startswith("*")]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8, "num_stages": 1},
    )
    shared = compiled.metadata.shared
    print(kernel.__name__, dtype, dim, "Lit" if lit else "decay", shared)
    assert shared <= SHARED_MEMORY, f"{shared} bytes of shared memory"


if __name__ == "__main__":
    for kernel, lit in product((forward_kernel, backward_kernel), (False, True)):
        for dtype, dim in (("bf16", 64), ("bf16", 128), ("fp32", 128)):
            compile_kernel(kernel, dtype, dim, lit)
