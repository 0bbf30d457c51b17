"""Kernels as operators of PyTorch, `lion::...`, for `torch.compile` and export, and their launches,
recorded for each layout of tensors and then repeated ("Host time" in `docs/kernels.md`)."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import accumulate, pairwise
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lion_kernels import tuning

MOST_RECORDINGS = 1024
_recorded: dict[Any, Callable[[Sequence[Tensor]], None] | None] = {}


class Launches:
    """Launches kernels, and keeps what is needed to repeat them with other tensors."""

    def __init__(self, tensors: Sequence[Tensor | None], options: tuple[Any, ...]):
        self.given = [t for t in tensors if t is not None]
        self.scratch: list[Tensor] = []
        self.steps: list[tuple[Any, tuple[int, ...], list[Any]]] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor for the time of the call."""
        self.scratch.append(self.given[0].new_empty(shape, dtype=dtype))
        return self.scratch[-1]

    def launch(self, kernel: triton.JITFunction, grid: tuple[int, ...], **arguments: Any) -> None:
        """`arguments` by name, launch options among them."""
        compiled = kernel[grid](**arguments)
        values = [arguments[name] for name in kernel.arg_names]
        self.steps.append((compiled, (*grid, 1, 1)[:3], values))

    def repeatable(self) -> Callable[[Sequence[Tensor]], None] | None:
        """Repeats the launches with other tensors; None if interpreted, or if tensors overlap."""
        count = len(self.given)
        sizes = (-(-t.nbytes // 512) * 512 for t in self.scratch)
        places = [0] * count + [*accumulate(sizes, initial=0)]
        ranges = sorted(
            (t.data_ptr(), t.data_ptr() + t.nbytes, min(i, count), places[i])
            for i, t in enumerate((*self.given, *self.scratch))
            if t.nbytes
        )
        overlap = any(a[1] > b[0] for a, b in pairwise(ranges))
        if overlap or any(compiled is None for compiled, *_ in self.steps):
            return None
        steps = []
        for compiled, grid, values in self.steps:
            slots = [  # (argument, tensor of the call, byte)
                (argument, i, place + value.data_ptr() - start)
                for argument, value in enumerate(values)
                if isinstance(value, Tensor)
                for start, end, i, place in ranges
                if start <= value.data_ptr() < end
            ]
            values = [0 if isinstance(value, Tensor) else value for value in values]
            steps.append((compiled, grid, values, slots))
        return partial(_repeat, steps, places[-1])

    @classmethod
    def run(cls, schedule: Callable, tensors: Sequence, options: tuple[Any, ...]) -> None:
        """Launches what `schedule(cls(tensors, options))` does; `tensors` are made contiguous.
        Nothing if the first is empty: kernels of heads would read what it has no memory for."""
        if not tensors[0].numel():
            return
        tensors = [t if t is None else t.contiguous() for t in tensors]
        given = [t for t in tensors if t is not None]
        aligned = not any(t.data_ptr() % 16 for t in given)
        layout = tuple(None if t is None else (t.shape, t.dtype) for t in tensors)
        # `make_plan` is replaced to tune it.
        key = (schedule, tuning.make_plan, given[0].device, aligned, layout, options)
        if repeat := _recorded.get(key):
            return repeat(given)
        call = cls(tensors, options)
        schedule(call)
        if len(_recorded) >= MOST_RECORDINGS:
            _recorded.clear()
        _recorded[key] = call.repeatable() if aligned else None


def _repeat(steps: list[tuple[Any, tuple, list[Any], list]], scratch: int, tensors: list) -> None:
    """The tensor after those of the call is memory for all that they had for the time of it."""
    workspace = tensors[0].new_empty(scratch, dtype=torch.uint8)
    addresses = [t.data_ptr() for t in (*tensors, workspace)]
    stream = triton.runtime.driver.active.get_current_stream(workspace.device.index)
    for compiled, grid, values, slots in steps:
        values = values.copy()
        for argument, i, offset in slots:
            values[argument] = addresses[i] + offset
        # Without hooks, whose calls take longer than the rest; those of a profiler see the first.
        handles = compiled.function, compiled.packed_metadata, None, None, None
        compiled.run(*grid, stream, *handles, *values)


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
