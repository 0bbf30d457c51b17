"""How decays start: how far a token's memory reaches before anything is learned.

A decay `1 - 2**-e` halves a memory in about `0.7 * 2**e` tokens; what is chosen here is e.
"""

import torch
from torch import Tensor

SHORTEST, LONGEST = 1.0, 6.0  # memories that halve in 1.4 and in about 45 tokens
DECAY_INITS = ("paper", "multiscale", "layers", "long")


def start_exponents(init: str, heads: int, layer: int, depth: int) -> Tensor:
    """The exponents e of the heads `[heads]` in layer `layer` of `depth`.

    `multiscale` spreads them evenly over the heads of every layer, `layers` over the layers, each
    of one exponent, and `long` has the longest memory everywhere.
    """
    match init:
        case "multiscale":
            return torch.linspace(SHORTEST, LONGEST, heads)
        case "layers":
            return torch.linspace(SHORTEST, LONGEST, depth)[layer].expand(heads)
        case "long":
            return torch.full((heads,), LONGEST)
    raise ValueError(f"Decays have no exponents by {init!r}.")


def decay_logits(exponents: Tensor) -> Tensor:
    """w with `sigmoid(w) = 1 - 2**-e`; a gate, `1 - sigmoid(b)`, starts there with b = -w."""
    return (2**exponents - 1).log()
