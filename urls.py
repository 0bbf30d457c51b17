"""Downloads that are checked before they are kept, and addresses without their secrets."""

import base64
import hashlib
import http.client
import logging
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from errors import UserError

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds that a server may be silent
PIECE = 2**20  # bytes read at once
USER_INFO_AND_QUERY = re.compile(
    r"(?i)\b([a-z][a-z0-9+.-]*://)(?:[^\s/?#]*@)?([^\s?#'\"]*)([?#][^\s'\"]*[^\s'\":,;.)])?"
)

Content = TypeVar("Content")


def is_url(source: str | Path) -> bool:
    return urlsplit(str(source)).scheme in ("http", "https")


def without_secrets(value: Any) -> Any:
    """`value`, in nested containers too, with user names, passwords and queries out of its URLs.

    Any parameter of a query may be a token, so "?..." stands for all of them.
    """
    if isinstance(value, str):
        return USER_INFO_AND_QUERY.sub(lambda m: m[1] + m[2] + ("?..." if m[3] else ""), value)
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = map(without_secrets, value)
        return list(items) if isinstance(value, list) else tuple(items)
    return value


def cached(url: str, folder: Path, read: Callable[[Path], Content]) -> Content:
    """What `read` makes of the file at `url`, which is kept in `folder`.

    A name that ends in `-HASH.suffix` tells the first digits of the file's SHA-256. Only a file of
    the promised length and hash that `read` accepts is kept; a kept one that no longer is so is
    downloaded again.

    Raises:
        UserError: `url` cannot be downloaded, or `read` refuses what it holds.
    """
    name = Path(urlsplit(url).path).name
    hashed = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if not hashed:
        # Many a URL ends in checkpoint.pth: one of them must not be taken for another.
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}"
    digest, path = hashed[1] if hashed else "", folder / name
    if path.exists():
        try:
            _check_digest(path, digest)
            return read(path)
        except (OSError, UserError) as error:
            logger.warning("%s is downloaded again, as the copy %s is damaged: %s",
                           without_secrets(url), path, error)  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as incomplete:
            new = Path(incomplete, name)
            _download(url, new)
            _check_digest(new, digest)
            content = read(new)
            os.replace(new, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {without_secrets(url)}: {_reason(error)} (check the address)"
        ) from error
    return content


def _download(url: str, path: Path) -> None:
    with (
        urllib.request.urlopen(_request(url), timeout=TIMEOUT) as response,
        path.open("xb") as file,
    ):
        length = response.length  # what the server promises, None if it does not
        with tqdm.wrapattr(response, "read", length, desc=path.name, disable=None) as body:
            shutil.copyfileobj(body, file, PIECE)
        if length is not None and file.tell() != length:
            raise OSError(f"it ended after {file.tell()} of {length} bytes")


def _request(url: str) -> urllib.request.Request:
    """urllib takes no user and password in an address."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl())
    if user:
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _check_digest(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected):
        raise OSError(f"its hash is {digest[: len(expected)]}, not {expected} as its name tells")


def _reason(error: Exception) -> str:
    if isinstance(error, http.client.InvalidURL):  # which quotes what may be secret
        return "it is no valid address"
    if isinstance(getattr(error, "reason", error), TimeoutError):
        return f"the server was silent for {TIMEOUT:g} s"
    return str(error)
