"""Files that are whole at every moment, and names that stay in their folder."""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`: raises UserError for a full disk and the like."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {error}. Make room for it, or mend the folder."
        ) from error


@contextmanager
def replacing(path: Path, mode: str = "x", **options: Any) -> Iterator[IO]:
    """A new file, opened in `mode` "x" or "xb", that takes the place of `path` after the block.

    Text is UTF-8. Until then, and if the block fails, `path` is what it was. Raises UserError for
    an OSError.
    """
    if mode == "x":
        options.setdefault("encoding", "utf-8")
    temporary = _temporary(path)
    with writing(path):
        temporary.unlink(missing_ok=True)
        try:
            with temporary.open(mode, **options) as file:  # "x": no link of this name is followed
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, to be filled and moved; what is left of it is removed.

    Raises UserError for an OSError.
    """
    temporary = _temporary(folder)
    with writing(folder):
        remove(temporary)
        try:
            temporary.mkdir(parents=True)  # fails for a link of this name, so that none is followed
            yield temporary
        finally:
            with suppress(OSError):
                remove(temporary)


def remove(path: Path) -> None:
    """Removes what is at `path`: a file, a folder with all in it, or a link alone; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A fixed name, so that a new attempt also replaces what a killed one has left."""
    return path.with_name(f".{path.name}.saving")


def inside(folder: str | os.PathLike, name: str, source: str | os.PathLike) -> str:
    """The path of a file that a list, read from `source`, names relative to `folder`.

    Raises UserError for a name that leads out of the folder.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(
            f"{source} names {name!r}, which is outside of its folder: mend the name, or get the "
            "data from a source that you trust."
        )
    return os.path.join(folder, name)


def is_folder_name(name: str) -> bool:
    """Whether a folder of that name lies in that of the output, and is no hidden one."""
    return bool(re.fullmatch(r"\w[\w.+-]*", name))


def require_file(path: str | os.PathLike) -> None:
    """Raises OSError for what is absent, and for pipes and devices, which would be waited for."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, f"{error.strerror}: check its name") from error
    if not stat.S_ISREG(mode):
        raise OSError("it is no file")


def require_place(output: Path) -> None:
    """Raises UserError if no file can be made at `output` (--output)."""
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file.")
    folder = output.resolve().parent
    if not folder.is_dir():
        raise UserError(f"There is no folder for --output {output}: make it first.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}).") from error
