"""Compiles for Hopper what the operators of `lion_kernels/` launch; needs Triton, but no GPU."""

import sys
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lion_kernels
from lion_kernels.scan import selective_scan
from lion_kernels.semiseparable import semiseparable_product

SHARED_MEMORY = 227 * 1024  # bytes that one block can have
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16",
            torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
            torch.uint8: "*u8"}  # fmt: skip


def type_of(value: object) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compile_launch(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
    """Takes the place of a launch."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: kwargs[k] for k in names if k in kwargs}
    options = {k: v for k, v in kwargs.items() if k not in names}
    constants = {p.name: values[p.name] for p in kernel.params
                 if p.is_constexpr or values[p.name] is None}  # fmt: skip
    signature = {k: "constexpr" if k in constants else type_of(values[k]) for k in names}
    sixteen = [i for i, k in enumerate(names) if k not in constants and (
        isinstance(values[k], Tensor) or (isinstance(values[k], int) and values[k] % 16 == 0)
    )]  # fmt: skip
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]]
                                                      for i in sixteen})  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    shared = compiled.metadata.shared
    print(kernel.__module__, kernel.__name__, constants, options, f"{shared} bytes", flush=True)
    assert shared <= SHARED_MEMORY, f"{shared} bytes of shared memory"


def launch_mixer(dtype: torch.dtype, dim: int, mask: str, n: int = 100) -> None:
    """Forward, backward where the dtype is trained by kernels, and the recurrence."""
    gates = lion_kernels.padded_gates(2) if mask == "Selective" else 0
    projected = torch.zeros(1, n, 3 * dim + gates, dtype=dtype)
    curves = None if mask == "Lit" else torch.arange(n).repeat(2, 1)
    decay = torch.zeros(2, 1) if mask == "Decay" else None
    options = {"heads": 1, "dim": dim, "scans": 1 if mask == "Lit" else 2, "lit": mask == "Lit"}
    trained = dtype in lion_kernels.HALF
    y = lion_kernels.mix(projected.requires_grad_(trained), decay, curves, **options)
    if trained:
        y.sum().backward()
    lion_kernels.mix(projected.detach(), decay, curves, **options, recurrent=True)


def launch_baselines(dtype: torch.dtype, dim: int) -> None:
    x = torch.zeros(1, 100, 1, dim, dtype=dtype, requires_grad=True)
    states = torch.zeros(1, 100, dim, dtype=dtype)
    semiseparable_product(x, torch.zeros(1, 100, 1), states, states).sum().backward()
    x, states = x[:, :, 0], states[..., :16]
    selective_scan(x, x.float(), torch.zeros(dim, 16), states, states).sum().backward()


if __name__ == "__main__":
    JITFunction.run = compile_launch
    for mask in ("Lit", "Decay", "Selective"):
        launch_mixer(torch.bfloat16, 64, mask)
    launch_mixer(torch.bfloat16, 64, "Selective", n=1000)
    launch_mixer(torch.float32, 128, "Selective")
    launch_baselines(torch.bfloat16, 64)
    launch_baselines(torch.float32, 64)
