"""Compiles every kernel for Hopper; needs Triton, but no GPU."""

import sys
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels.chunked import backward_kernel, forward_kernel

SHARED_MEMORY = 227 * 1024  # bytes that one block can have
IN_QKV_DTYPE = ("QKV", "STATES", "OUT", "DOUT", "DQKV")
FLOATS = ("X", "Y", "VECTORS", "R", "FLUX")


def compile_kernel(kernel, dtype, dim, lit):
    constants = {
        "D": dim, "BLOCK": 64 if dtype == "bf16" and dim <= 64 else 32, "LIT": lit,
        "DECAY": not lit, "CURVED": not lit, "ADD": not lit, "WEIGHT": 1.0, "NORMALISE": True,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
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
    assert compiled.metadata.shared <= SHARED_MEMORY, (kernel, dtype, dim)


if __name__ == "__main__":
    for kernel, lit in product((forward_kernel, backward_kernel), (False, True)):
        for dtype, dim in (("bf16", 64), ("bf16", 128), ("fp32", 128)):
            compile_kernel(kernel, dtype, dim, lit)
