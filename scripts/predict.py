"""Name what images show: the most likely classes of each, as CSV or JSON.

    python scripts/predict.py --checkpoint demo/lion_s.pth demo/images --output predictions.json

Images are of any size and of every format that Pillow reads; folders are searched for them.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import open_streams
from datasets import images_in
from errors import UserError
from files import replacing, require_place
from images import load_image
from pretrained import Pretrained
from processes import init_distributed
from scripts import trained_model

FORMATS = ("csv", "json")
Prediction = dict[str, str | float]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and the images in its folders, sorted, hidden ones left out.

    Raises:
        UserError: a path does not exist, or a folder cannot be listed or holds no image.
    """
    Image.init()
    known = tuple(suffix for suffix, name in Image.EXTENSION.items() if name in Image.OPEN)
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no image or folder {path}: check its name.")
        if path.is_file():
            files.append(path)
            continue
        found, _ = images_in(path, known)
        if not found:
            raise UserError(f"The folder {path} holds no images: name a folder that does.")
        files += sorted(map(Path, found))
    return files


@torch.inference_mode()
def predict(
    trained: Pretrained, files: Sequence[Path], *, top: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Path, list[Prediction] | OSError]]:
    """For each file the `top` classes and their probabilities, or why it cannot be read."""
    transform = create_transform(**trained.images.for_timm())
    model, names = trained.model.to(device), trained.class_names
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        read, problems = {}, {}
        for file in batch:
            try:
                read[file] = transform(load_image(file))
            except OSError as error:
                problems[file] = error
        found = dict(problems)
        if read:
            logits = model(torch.stack(list(read.values())).to(device))
            best = logits.float().softmax(1).topk(min(top, len(names)))
            for file, shares, indices in zip(
                read, best.values.tolist(), best.indices.tolist(), strict=True
            ):
                found[file] = [
                    {"class": names[index], "probability": round(share, 6)}
                    for share, index in zip(shares, indices, strict=True)
                ]
        yield from ((file, found[file]) for file in batch)


def as_csv(predictions: dict[Path, list[Prediction]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability"])
    for file, classes in predictions.items():
        for rank, found in enumerate(classes, start=1):
            writer.writerow([file, rank, found["class"], f"{found['probability']:.6f}"])
    return text.getvalue()


def as_json(predictions: dict[Path, list[Prediction]]) -> str:
    records = [{"image": str(file), "predictions": p} for file, p in predictions.items()]
    return json.dumps(records, indent=2, ensure_ascii=False) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of images")
    trained_model.add_arguments(parser)
    add("--top", type=int, default=5, help="classes for each image (default: %(default)s)")
    add("--output", type=Path, help="a file, .csv or .json (default: CSV on standard output)")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if min(options.top, options.batch_size) < 1:
            raise UserError("--top and --batch-size must be at least 1.")
        if options.output and options.output.suffix[1:] not in FORMATS:
            raise UserError(f"--output {options.output} must end in .csv or .json.")
        if options.output:
            require_place(options.output)
        options.files = find_images(options.images)
        options.device = init_distributed(options.device).device
        options.trained = trained_model.load(options)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    open_streams()
    options = parse(arguments)
    found: dict[Path, list[Prediction] | OSError] = {}
    stopped, code = [], 1
    try:
        for file, result in predict(
            options.trained,
            options.files,
            top=options.top,
            batch_size=options.batch_size,
            device=options.device,
        ):
            found[file] = result
    except (KeyboardInterrupt, UserError) as error:  # what is done is kept
        done = f"stopped after {len(found)} of {len(options.files)} images"
        stopped = [*map(str, error.args), done]  # Ctrl-C has none
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    predictions = {file: p for file, p in found.items() if not isinstance(p, OSError)}
    problems = stopped + [str(p) for p in found.values() if isinstance(p, OSError)]
    if not predictions:
        _leave(code if stopped else 2, problems)
    write = as_json if options.output and options.output.suffix == ".json" else as_csv
    if options.output:
        try:
            with replacing(options.output, errors="backslashreplace") as file:  # of names no UTF-8
                file.write(write(predictions))
        except UserError as error:
            _leave(2, [str(error)])
    else:
        print(write(predictions), end="")
    if problems:
        _leave(code, problems)


def _leave(code: int, problems: Sequence[str]) -> None:
    print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
