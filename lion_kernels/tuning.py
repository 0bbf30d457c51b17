"""How a call is cut: the algorithm, tokens per chunk and tile, and launch options, as measured on
an H100; "Launch options" in `docs/kernels.md` has figures, and how to tune another card."""

from dataclasses import dataclass, field

import triton

# Tokens up to which one chunk, or all pairs along several curves at once, are faster than states.
LONGEST_CHUNK = 320
LONGEST_PAIRS = 640
CHUNK = 128


@dataclass(frozen=True)
class Plan:
    """`forward` and `backward` are files, "linear", "pairs" or "chunks"; by chunks before by pairs
    goes along all curves at once. A sequence has chunks of `chunk` tokens in tiles of `block`; the
    dictionaries are launch options of kernels."""

    forward: str
    backward: str
    chunk: int
    block: int
    fwd: dict[str, int] = field(default_factory=dict)
    dq: dict[str, int] = field(default_factory=dict)
    dkv: dict[str, int] = field(default_factory=dict)
    state: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Tokens of a chunk, filled up to whole tiles."""
        return triton.cdiv(self.chunk, self.block) * self.block


def make_plan(n: int, dim: int, itemsize: int, num_curves: int, no_decay: bool) -> Plan:
    """For `n` tokens and heads of width `dim`, in a dtype of `itemsize` bytes."""
    half = itemsize == 2
    block = 64 if half else 32
    warps = {"num_warps": 4 if dim < 128 else 8, "num_stages": 1}
    # So that four, or three, programs of four warps have room on a multiprocessor.
    four, three = ({"maxnreg": 128}, {"maxnreg": 168}) if half and dim == 64 else ({}, {})
    if no_decay:
        tiles = {**warps, "num_stages": 2, "BLOCK": block}
        fwd, dkv = {**tiles, **four}, {**tiles, **three}
        return Plan("linear", "linear", 512, block, fwd, tiles, dkv, fwd)
    # Whole tiles, and a last one of a power of 2, at least 16.
    rest = n % block
    filled = n - rest + (max(16, triton.next_power_of_2(rest)) if rest else 0)
    tiles = {**warps, "BLOCK_N": 32}
    resident, streamed = {**warps, **three}, {**tiles, **three}
    one_chunk = n <= (block if not half else LONGEST_CHUNK if dim <= 64 else CHUNK)
    if num_curves > 1 and n <= (LONGEST_PAIRS if half else block):
        forward, fwd = ("chunks", resident) if one_chunk else ("pairs", {**tiles, **four})
        return Plan(forward, "pairs", filled, block, fwd, streamed, streamed)
    if one_chunk:
        return Plan("chunks", "chunks", filled, block, resident, resident, streamed)
    chunk = CHUNK if half else block
    dkv, state = {**warps, "BLOCK_N": block}, {**resident, "BLOCK": chunk}
    return Plan("chunks", "chunks", chunk, block, resident, warps, dkv, state)
