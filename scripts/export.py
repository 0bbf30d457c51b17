"""Export a trained model for other programs.

    python scripts/export.py --checkpoint demo/lion_s.pth --to onnx --output lion.onnx

What `--to` writes to `--output`:

- `onnx`: a file, compared with the model by onnxruntime (pip install onnx onnxscript onnxruntime);
- `torch`: a `.pt2` file for `torch.export.load`, compared likewise;
- `safetensors`: a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`, with its
  preprocessing and a model card;
- `hub`: the same, uploaded to the Hugging Face Hub as OWNER/NAME;
- `checkpoint`: weights and settings alone, for every command here; in float16 with `--half`.

`onnx` and `torch` take any batch, and any size of whole patches, in every mask and format. They are
of one size for the orders Morton and Hilbert, whose curves are decided by loops over the grid, and
for models other than LION and timm's vision transformers; `--fixed-size` asks for one size. Neither
holds LION's GPU kernels, and a model of softmax attention stays quadratic.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.export import Dim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from errors import UserError, first_line
from files import new_folder, require_place
from journal import RUN_FILES, require_writable
from models_hydra import HydraMixer
from models_vim import VimMixer
from pretrained import Pretrained
from processes import World
from publishing import push_to_hf_hub, save_for_hf, save_weights
from scripts import trained_model

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "checkpoint": ".pth"}
TARGETS = (*SUFFIXES, "safetensors", "hub")
NEEDED = ("onnx", "onnxscript", "onnxruntime")
DECIDED_BY_LOOPS = ("Morton", "Hilbert")
MOST_PATCHES = 512  # on a side
Size = tuple[int, int, int, int]


def takes_any_size(model: nn.Module) -> bool:
    """Whether an export holds for other sizes than the one that it was made with."""
    order = getattr(model, "order", "Normal").split("+")
    return (
        isinstance(model, VisionTransformer)
        and not any(name in order for name in DECIDED_BY_LOOPS)
        and not any(isinstance(module, HydraMixer | VimMixer) for module in model.modules())
    )


def shapes(model: nn.Module, size: Sequence[int], any_size: bool) -> tuple[dict, list[Size]]:
    """What varies among the dimensions of images, and shapes to try: the first is exported with."""
    varying, (channels, height, width) = {0: Dim("batch", min=1, max=4096)}, size
    own = [(batch, channels, height, width) for batch in (2, 1, 3)]
    if not any_size:
        return varying, own
    rows, columns = model.patch_embed.patch_size
    varying |= {2: rows * Dim("rows", min=2, max=MOST_PATCHES),
                3: columns * Dim("columns", min=2, max=MOST_PATCHES)}  # fmt: skip
    other = (2, channels, height + rows, width + 2 * columns)
    return varying, [other, *own, (1, channels, 2 * height, 2 * width)]


def to_torch(model: nn.Module, example: Tensor, varying: dict, path: Path) -> Callable:
    """Writes the file; returns what it computes."""
    program = torch.export.export(model, (example,), dynamic_shapes=(varying,))
    torch.export.save(program.run_decompositions({}), path)  # as it is, it cannot hold autocast
    return torch.export.load(path).module()


def to_onnx(model: nn.Module, example: Tensor, varying: dict, path: Path) -> Callable:
    """Writes the file; returns what onnxruntime makes of it."""
    import onnxruntime

    torch.onnx.export(
        model, (example,), path, dynamo=True, dynamic_shapes=(varying,), external_data=False,
        input_names=["images"], output_names=["logits"], verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def export(trained: Pretrained, kind: str, path: Path, *, any_size: bool) -> list[Size]:
    """Writes an `onnx` or `torch` file and compares it with the model at the shapes returned.

    Raises:
        RuntimeError: the model cannot be exported so, or the file computes something else. What was
            at `path` before stays.
    """
    model = trained.model
    varying, tried = shapes(model, trained.images.input_size, any_size)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(shape, generator=generator) for shape in tried]
    write = {"torch": to_torch, "onnx": to_onnx}[kind]
    try:
        with new_folder(path) as folder:
            exported = write(model, samples[0], varying, folder / path.name)
            for images in samples:
                torch.testing.assert_close(exported(images), model(images), atol=1e-4, rtol=1e-3)
            os.replace(folder / path.name, path)
    except Exception as error:  # exporters raise whatever happens inside them
        advice = " (perhaps with --fixed-size)" if any_size else ""
        raise RuntimeError(
            f"This model cannot be exported to {kind}: {first_line(error)}{advice}"
        ) from error
    return tried


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    trained_model.add_arguments(parser)
    add("--to", required=True, choices=TARGETS)
    add("--output", required=True, help="file or folder, or OWNER/NAME of hub")
    add("--fixed-size", action="store_true", help="onnx and torch for images of one size alone")
    add("--half", action="store_true", help="checkpoint: weights in float16")
    options = parser.parse_args(arguments)
    try:
        check(options)
        options.trained = load(options)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return options


def check(options: argparse.Namespace) -> None:
    """Raises UserError for options that contradict each other or the machine."""
    computes = options.to in ("onnx", "torch")
    sized = options.chunk_size is not None
    if not computes and (options.format or sized or options.fixed_size):
        raise UserError(
            "--format, --chunk-size and --fixed-size are of --to onnx and torch: leave them out."
        )
    if options.half and options.to != "checkpoint":
        raise UserError("--half is of --to checkpoint: leave it out.")
    suffix = SUFFIXES.get(options.to)
    if suffix and Path(options.output).suffix != suffix:
        raise UserError(f"--to {options.to} writes a file: --output must end in {suffix}.")
    if suffix:
        require_place(Path(options.output))
        _require_of_no_run(Path(options.output), options.checkpoint)
    elif options.to != "hub":
        require_writable(Path(options.output), World(), "--output")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if options.to == "onnx" and missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}.")


def _require_of_no_run(output: Path, source: str) -> None:
    """Raises UserError for an output that would replace the checkpoint, or another of its run."""
    is_source = output.exists() and Path(source).exists() and output.samefile(source)
    if is_source or (output.name in RUN_FILES and output.exists()):
        raise UserError(f"--output {output} is a file of a run: choose another name or folder.")


def load(options: argparse.Namespace) -> Pretrained:
    """Raises UserError as `trained_model.load` does."""
    trained = trained_model.load(options)
    if options.to in ("onnx", "torch") and not options.fixed_size and takes_any_size(trained.model):
        trained = trained_model.load(options, trained.saved, dynamic_img_size=True)
    return trained


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    trained, path = options.trained, Path(options.output)
    try:
        match options.to:
            case "safetensors":
                save_for_hf(trained, path)
            case "hub":
                options.output = push_to_hf_hub(trained, options.output)
            case "checkpoint":
                save_weights(trained, path, half=options.half)
            case kind:
                export_quietly(trained, kind, path, fixed=options.fixed_size)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"wrote {options.output}")


def export_quietly(trained: Pretrained, kind: str, path: Path, *, fixed: bool) -> None:
    any_size = getattr(trained.model, "dynamic_img_size", False)
    if not any_size and not fixed:
        print("It takes images of one size alone: its order or architecture settles it.")
    logging.disable(logging.WARNING)  # exporters warn of their own code
    try:
        with warnings.catch_warnings(action="ignore"):
            tried = export(trained, kind, path, any_size=any_size)
    finally:
        logging.disable(logging.NOTSET)
    print("agrees with the model for", ", ".join("x".join(map(str, shape)) for shape in tried))


if __name__ == "__main__":
    main()
