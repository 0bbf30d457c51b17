"""How kernels become operators of PyTorch, `lion::...`, for `torch.compile` and export."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def operator(
    name: str,
    like: Callable,
    schema: str = "",
    save: Callable | None = None,
    gradients: Callable | None = None,
) -> Callable:
    """Makes a function of tensors that changes none of them the operator `lion::name`.

    `like` takes the same arguments and returns tensors like the results, without their values;
    `save` and `gradients` are what `torch.library.register_autograd` takes. The schema is inferred
    if it is not given. An eager call goes round the dispatcher, whose Python takes longer than the
    launches, and which `dispatched` goes through.
    """

    def register(function: Callable) -> Callable:
        found = schema or torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"lion::{name}", found, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"lion::{name}", "default", function)
        torch.library.register_fake(f"lion::{name}", like)
        dispatched, direct = getattr(torch.ops.lion, name).default, function
        if gradients is not None:
            torch.library.register_autograd(f"lion::{name}", gradients, setup_context=save)
            direct = _function(name, function, save, gradients).apply

        @wraps(function)
        def call(*arguments):
            return (direct if _is_eager(arguments[0]) else dispatched)(*arguments)

        call.dispatched = dispatched
        return call

    return register


def _function(name: str, function: Callable, save: Callable, gradients: Callable) -> type[Function]:
    def forward(
        ctx, *inputs
    ):  # with a `setup_context`, PyTorch would inspect each call's signature
        output = function(*inputs)
        save(ctx, inputs, output)
        return output

    methods = {"forward": forward, "backward": once_differentiable(gradients)}
    return type(name, (Function,), {key: staticmethod(f) for key, f in methods.items()})


def _is_eager(tensor: Tensor) -> bool:
    """Whether nothing but autograd looks at calls: no compiler, mode or subclass."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not is_in_torch_dispatch_mode()
    )
