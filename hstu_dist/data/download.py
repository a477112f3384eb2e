"""A file from the web, fetched once: whole under its name, or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import logging
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hstu_dist.errors import UserError
from hstu_dist.files import replacing, sync

TIMEOUT_SECONDS = 30

_log = logging.getLogger(__name__)


def is_url(source: str) -> bool:
    """Whether a source is to be fetched, rather than a path."""
    return source.startswith(("http://", "https://"))


def name_of(source: str) -> str:
    """The file name at the end of a path or URL."""
    return Path(unquote(urlsplit(source).path) if is_url(source) else source).name


def fetch(url: str, folder: Path, remedy: str) -> Path:
    """The file at `url`, downloaded into `folder` unless it is there already.

    Args:
        url: http or https.
        folder: made if missing; files of the same name from different addresses do not meet in it.
        remedy: what to do where the address is not reachable.

    Raises:
        UserError: the file cannot be fetched completely, or not be written.
    """
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name_of(url)}"
    if target.is_file():
        _log.info("%s: downloaded before, from %s", target, url)
        return target
    _log.info("%s: downloading %s", target, url)
    try:
        _download(url, target)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be fetched ({type(error).__name__}: {error})", remedy) from error
    return target


def _download(url: str, target: Path) -> None:
    with replacing(target) as file, urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        shutil.copyfileobj(response, file)
        got, announced = file.tell(), response.headers.get("Content-Length")
        # read in pieces, a connection that was cut looks like the end of the file
        if announced is not None and got != int(announced):
            raise OSError(f"got {got} of {announced} bytes")
    sync(target.parent)
