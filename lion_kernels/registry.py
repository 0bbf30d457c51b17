"""How the kernels become operators of PyTorch, `lion::...`, for `torch.compile` and export."""

from collections.abc import Callable

import torch


def operator(name: str, like: Callable, schema: str = "") -> Callable:
    """Makes a function of tensors that changes none of them the operator `lion::name`.

    `like` takes the same arguments and returns tensors like the results, without their values. The
    schema is inferred if it is not given. `torch.library.custom_op` does the same, but has more
    Python around each call.
    """

    def register(function: Callable) -> torch._ops.OpOverload:
        found = schema or torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"lion::{name}", found, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"lion::{name}", "default", function)
        torch.library.register_fake(f"lion::{name}", like)
        return getattr(torch.ops.lion, name).default

    return register
