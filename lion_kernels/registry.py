"""How kernels become operators of PyTorch, `lion::...`, for `torch.compile` and export."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def operator(
    name: str, like: Callable, schema: str = "", backward: Callable | None = None, tensors: int = 0,
    saved: slice = slice(0),
) -> Callable:  # fmt: skip
    """Makes a function of tensors that changes none of them the operator `lion::name`.

    `like` takes the same arguments and returns tensors like the results, without their values. The
    schema is inferred if it is not given. `backward` takes the first output's gradient, the outputs
    that are `saved`, and the arguments, of which the first ones are `tensors`; it returns gradients
    of some from the first on. Eager calls go round the dispatcher, whose Python takes longer than
    the launches; `dispatched` goes through it.
    """

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.options = inputs[tensors:]
        outputs = output[saved] if isinstance(output, tuple) else ()
        ctx.save_for_backward(*outputs, *inputs[:tensors])

    def gradients(ctx, grad, *_):
        needed = ctx.needs_input_grad
        given = () if grad is None else backward(grad, *ctx.saved_tensors, *ctx.options)
        given = [g if need else None for g, need in zip(given, needed, strict=False)]
        return *given, *(None,) * (len(needed) - len(given))

    def register(function: Callable) -> Callable:
        function = _on_the_tensors_device(function)
        found = schema or torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"lion::{name}", found, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"lion::{name}", "default", function)
        torch.library.register_fake(f"lion::{name}", like)
        dispatched, direct = getattr(torch.ops.lion, name).default, function
        if backward is not None:
            torch.library.register_autograd(f"lion::{name}", gradients, setup_context=save)

            def forward(ctx, *inputs):  # a `setup_context`'s signature is looked at in each call
                output = function(*inputs)
                save(ctx, inputs, output)
                return output

            methods = {"forward": forward, "backward": once_differentiable(gradients)}
            methods = {key: staticmethod(method) for key, method in methods.items()}
            direct = type(name, (Function,), methods).apply

        @wraps(function)
        def call(*arguments):
            # Eager: nothing but autograd looks at the call, no compiler, mode or subclass.
            eager = type(arguments[0]) in (Tensor, torch.nn.Parameter)
            eager = eager and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()
            return (direct if eager else dispatched)(*arguments)

        call.dispatched = dispatched
        return call

    return register


def _on_the_tensors_device(function: Callable) -> Callable:
    """PyTorch's own operators run on the GPU of their tensors, Triton's launches on the current."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        device = arguments[0].device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    return call
