"""Bytes from a URL, with their progress on stderr."""

from __future__ import annotations

import http.client
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

_BLOCK = 256 << 10
_PATIENCE = 30.0  # seconds without a byte
_LONGEST_S = 3600.0  # of a whole file
_MOST_BYTES = 256 << 20  # of a file: the largest of a known data set has 163 MiB


class RemoteError(Exception):
    """The other side, or the way there, failed; the message says how."""


class AbsentError(RemoteError):
    """The server answers, but has no such file."""


def download_blocks(url: str) -> Iterator[bytes]:
    """The content of ``url`` in blocks; a progress bar on stderr, or one line if stderr is not a terminal.

    Raises:
        RemoteError: no connection, a refusal, an end before the announced length, more bytes than any data set has,
            or a transfer of more than an hour.
    """
    end = time.monotonic() + _LONGEST_S
    with _opened(url) as response:
        total = _announced(response)
        _check_size(url, total or 0)
        done = 0
        with _progress(url, total) as advance:
            while block := _read(response, url):
                yield block
                done += len(block)
                _check_size(url, done)
                if time.monotonic() > end:
                    raise RemoteError(f"could not download {url}: {done} bytes took more than {_LONGEST_S:.0f} s")
                advance(len(block))
    if total is not None and done < total:
        raise RemoteError(f"could not download {url}: connection ended after {done} of {total} bytes")


def _check_size(url: str, size: int) -> None:
    if size > _MOST_BYTES:
        raise RemoteError(f"could not download {url}: it has {size} bytes or more, expected at most {_MOST_BYTES}")


def _announced(response: IO[bytes]) -> int | None:
    length = str(cast(Any, response).headers.get("Content-Length"))
    return int(length) if re.fullmatch("[0-9]{1,18}", length) else None


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    with _failures_named(url):
        response = urllib.request.urlopen(url, timeout=_PATIENCE)
    with response:
        yield response


def _read(response: IO[bytes], url: str) -> bytes:
    with _failures_named(url):
        return response.read(_BLOCK)


@contextmanager
def _failures_named(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        kind = AbsentError if error.code in (403, 404, 410) else RemoteError  # S3 says 403 for "no such file"
        raise kind(f"could not download {url}: HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        raise RemoteError(f"could not download {url}: {reason}") from error


@contextmanager
def _progress(url: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Give what is to be told of each block's size."""
    if not sys.stderr.isatty():
        print(f"downloading {url}", file=sys.stderr, flush=True)
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"downloading {url.rsplit('/', 1)[-1]}", total=total)
        yield lambda size: progress.advance(task, size)
