"""How a call is cut: the algorithm, tokens per chunk and tile, and launch options.

Measured on an H100 (80 GB, torch 2.11, triton 3.6), bfloat16, 12 heads of width 64; see
`docs/kernels.md` for the figures and for how to tune another card.
"""

from dataclasses import dataclass, field

import triton

Options = dict[str, int]

# Tokens up to which one chunk, or all pairs along several curves at once, are faster than states.
LONGEST_CHUNK = 320
LONGEST_PAIRS = 640
CHUNK = 128


@dataclass(frozen=True)
class Plan:
    """`forward` and `backward` are "linear" (`linear.py`), "pairs" (`pairs.py`) or "chunks"
    (`chunks.py`); a forward pass by chunks before a backward one by pairs goes along all curves.

    A sequence has chunks of `chunk` tokens in tiles of `block`; the dictionaries are launch options
    of kernels.
    """

    forward: str
    backward: str
    chunk: int
    block: int
    fwd: Options = field(default_factory=dict)
    dq: Options = field(default_factory=dict)
    dkv: Options = field(default_factory=dict)
    state: Options = field(default_factory=dict)

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
        return Plan("linear", "linear", 512, block, fwd=fwd, dq=tiles, dkv=dkv, state=fwd)
    tiles = {**warps, "BLOCK_N": 32}
    resident, streamed = {**warps, **three}, {**tiles, **three}
    one_chunk = n <= (block if not half else LONGEST_CHUNK if dim <= 64 else CHUNK)
    if num_curves > 1 and n <= (LONGEST_PAIRS if half else block):
        forward, fwd = ("chunks", resident) if one_chunk else ("pairs", {**tiles, **four})
        return Plan(forward, "pairs", _whole_tiles(n, block), block, fwd, streamed, streamed)
    if one_chunk:
        chunk = _whole_tiles(n, block)
        return Plan("chunks", "chunks", chunk, block, fwd=resident, dq=resident, dkv=streamed)
    chunk = CHUNK if half else block
    return Plan(
        "chunks", "chunks", chunk, block, fwd=resident, dq=warps,
        dkv={**warps, "BLOCK_N": block}, state={**resident, "BLOCK": chunk},
    )  # fmt: skip


def _whole_tiles(n: int, block: int) -> int:
    """`n` filled up to whole tiles and one of a power of 2, at least 16."""
    rest = n % block
    return n - rest + (max(16, triton.next_power_of_2(rest)) if rest else 0)
