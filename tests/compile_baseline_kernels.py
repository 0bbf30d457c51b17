"""Compiles the baselines' kernels for Hopper; needs Triton, but no GPU."""

import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels import scan, semiseparable

SHARED_MEMORY = 227 * 1024  # bytes that one block can have
FLOATS = ("DELTA", "A", "STATES", "DDELTA", "DA", "DB", "DC", "DSTATE", "DECAY", "DDECAY")


def compile_kernel(kernel, dtype, floats, constants, num_warps):
    """`floats` are float32, other pointers of type `dtype`."""
    types = {name: "*fp32" if name in floats else f"*{dtype}" for name in kernel.arg_names}
    types |= {name: "i32" for name in kernel.arg_names if name.islower()}
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, t in enumerate(signature.values()) if t.startswith("*")]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": 1},
    )
    shared = compiled.metadata.shared
    print(kernel.__module__, kernel.__name__, dtype, constants, shared)
    assert shared <= SHARED_MEMORY, f"{shared} bytes of shared memory"


def compile_scan(dtype):
    constants = {"CHUNK": scan.CHUNK, "BLOCK": scan.BLOCK}
    for kernel in (scan.forward_kernel, scan.backward_kernel):
        compile_kernel(kernel, dtype, (*FLOATS, "B", "C"), constants, 1)


def compile_product(dtype, torch_dtype, width, states):
    x = torch.empty(1, 1, 1, width, dtype=torch_dtype, device="meta")
    given = semiseparable.options(x, x.new_empty(1, 1, states))
    constants = {name: value for name, value in given.items() if name.isupper()}
    for name, warps in semiseparable.WARPS.items():
        kernel = getattr(semiseparable, f"{name}_kernel")
        compile_kernel(kernel, dtype, ("DECAY", "DDECAY"), constants, warps)


if __name__ == "__main__":
    compile_scan("bf16")
    compile_product("bf16", torch.bfloat16, 64, 64)
    compile_product("bf16", torch.bfloat16, 128, 128)
    compile_product("fp32", torch.float32, 128, 128)
