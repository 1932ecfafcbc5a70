"""A cache that lies far away: anything fsspec opens, read through shards kept on this machine.

The manifest is fetched first. It says what the bytes of every shard hash to, and a shard that does
not is never read.
"""

import contextlib
import errno
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from erw.data.cache import Cache
from erw.data.manifest import MANIFEST, Manifest, Which, by_file
from erw.data.shards import ShardReader, Written
from erw.data.store import SIZE, TRIES, CameDamaged, NoRoom, Store
from erw.errors import CacheError, one_line

THREADS = 8  # that fetch ahead: object stores give their bandwidth to many connections
PAUSE = 0.5  # seconds before the second attempt at a file, doubled before the third
_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
_OF_THE_REST = {"s3": "erw[remote]", "s3a": "erw[remote]", "gs": "gcsfs", "gcs": "gcsfs"}
_PACKAGES = _OF_THE_REST | dict.fromkeys(("http", "https"), "erw[remote]")


class Remote(Cache):
    """A `Cache` at a URL. Rows and batches are those of the same cache on a local disk.

    Files of shards are fetched whole when they are first needed, or before, where a `Loader` says
    what comes next; what is not read is not fetched. See `Store` for what is kept of them.
    """

    threads = 1  # a full store has room for what one of them reads

    def __init__(self, far: "Far", text: bytes, store: Store) -> None:
        self._far, self._text, self._store = far, text, store
        super().__init__(store.folder, Manifest.parse(text, where=f"{far.url}/{MANIFEST}"))
        self.where = far.url
        self._ahead = Ahead(self.file)

    @classmethod
    def open(cls, path: str | Path) -> "Remote":
        """Open a finished cache at a URL. `CacheError` if it cannot be read, is damaged or empty.

        Credentials and addresses are found as fsspec's file system for such URLs finds them.
        """
        far = Far(str(path))
        cache = cls(far, far.text(MANIFEST), Store.of_this_machine())
        if not len(cache):
            raise CacheError(f"cache {path} has no rows: prepare it again")
        return cache

    @cached_property
    def identity(self) -> str:
        """A hash of everything that the cache holds, the same as on a local disk."""
        return blake3(self._text).hexdigest()[:32]

    def admit(self, window: int, columns: Sequence[str]) -> None:
        """Raise `CacheError` unless what is read together fits on this machine.

        All shards without a window, else two windows: the one being read and the next.
        """
        files = self._needed(range(len(self._shards)), columns)
        sizes = sorted((sum(file.bytes for file in some) for some in files), reverse=True)
        need = 2 * sum(sizes[:window]) if 0 < 2 * window < len(sizes) else sum(sizes)
        if need <= self._store.limit:
            return
        told = f"{need / 1e9:.4g} GB of {self.where} are read at random at a time"
        most = int(self._store.limit // (2 * sizes[0]))
        window_too = f", or give --data.window {most} (rows of {most} shards are mixed at a time)"
        raise CacheError(
            f"{told}, but {self._store.folder} may hold {self._store.limit / 1e9:.4g} GB: set "
            f"{SIZE} to {math.ceil(need / 1e7) / 100} or more" + window_too * (most > 0)
        )

    def expect(self, shards: Callable[[], np.ndarray], columns: Sequence[str]) -> None:
        """Fetch these in the background, in this order, in place of what was said before."""
        self._shard.cache_clear()  # what is open stays on the disk, also where nobody reads it now
        self._ahead.want([*chain.from_iterable(self._needed(shards().tolist(), columns))])

    def file(self, file: Written) -> Path:
        """One of its files on this machine, fetched if it is not here."""
        name = f"shards/{file.file}"
        get = partial(self._far.download, name)
        return self._store.fetch(file, get, source=f"{self._far.url}/{name}")

    def _whole(self, file: Written) -> bool:
        """Whether the original is whole; a copy here that is not is fetched once more."""
        try:
            if super()._whole(file):
                return True
            self._store.drop(file)
            return super()._whole(file)
        except CameDamaged:
            return False

    def _needed(self, shards: Iterable[int], columns: Sequence[str]) -> list[list[Written]]:
        """For each of these shards the files that the columns lie in."""
        which = list(by_file(columns, tuple(self.features)))
        return [[self._written(number, one) for one in which] for number in shards]

    def _open(self, number: int, which: Which) -> ShardReader:
        file, rows = self._written(number, which), self._shards[number].rows
        for attempt in range(TRIES):
            try:
                path = self.file(file)
            except NoRoom:
                if attempt == TRIES - 1:
                    raise
                self._shard.cache_clear()  # what this process keeps open may leave
                self._ahead.stop()  # and what it would need later need not come now
                continue
            try:
                return ShardReader(path, rows=rows, variants=self.variants, hold=True)
            except CacheError:
                if path.exists():
                    raise
                continue  # another process made room in between
        raise NoRoom(f"{self._store.folder} is too small for all who use it: set {SIZE} to more")


class Far:
    """Files below a URL. Each method raises `CacheError`, in one line, if a file cannot be had."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            self._files, self._root = url_to_fs(self.url)
        except ImportError as error:
            kind = self.url.partition(":")[0]
            package = _PACKAGES.get(kind)
            told = f"pip install '{package}'" if package else one_line(error, 200)
            raise CacheError(
                f"{url}: to read {kind}:// something is not installed: {told}"
            ) from error
        except Exception as error:  # every file system has its own
            raise CacheError(f"{url} cannot be opened: {one_line(error, 200)}") from error

    def text(self, name: str) -> bytes:
        """The contents of a small file."""
        return self._get(name, self._files.cat_file)

    def download(self, name: str, to: Path) -> None:
        """Copy a file here."""
        self._get(name, lambda path: self._files.get_file(path, str(to)))

    def _get(self, name: str, get: Callable[[str], Any]) -> Any:
        for attempt in range(TRIES):
            try:
                return get(f"{self._root}/{name}")
            except Exception as error:  # OSError and, of botocore and aiohttp, others that are none
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                told, final = _why(error)
                if final or attempt == TRIES - 1:
                    raise CacheError(f"{self.url}/{name} {told}") from error
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _why(error: Exception) -> tuple[str, bool]:
    """Why a file cannot be had, and whether another attempt would be in vain."""
    if isinstance(error, FileNotFoundError):
        return "is not there: check the address, and that erw prepare has finished", True
    if {kind.__name__ for kind in type(error).__mro__} & _CREDENTIALS:
        return (
            "needs credentials and none were found: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            True,
        )
    if isinstance(error, PermissionError):
        return f"may not be read with the credentials at hand ({one_line(error, 200)})", True
    return f"cannot be reached ({one_line(error, 200)}): check network and address", False


class Ahead:
    """Calls `fetch` on files in the background, by threads that end when none is left.

    They are daemons: a program that ends does not wait for downloads.
    """

    def __init__(self, fetch: Callable[[Written], object], *, threads: int = THREADS) -> None:
        self._fetch, self._threads = fetch, threads
        self._begin()

    def _begin(self) -> None:
        self._running, self._process = 0, os.getpid()
        self._wanted: deque[Written] = deque()
        self._lock = threading.Condition()

    def want(self, files: Sequence[Written]) -> None:
        """Fetch these, in this order, and forget what was wanted before."""
        if self._process != os.getpid():  # forked: the threads stayed behind, maybe with the lock
            self._begin()
        with self._lock:
            self._wanted = deque(files)
            more = min(self._threads - self._running, len(files))
            self._running += more
        for _ in range(more):
            threading.Thread(target=self._work, daemon=True, name="fetch ahead").start()

    def stop(self) -> None:
        """Forget what is wanted, and wait for what is on its way."""
        self.want([])
        with self._lock:
            self._lock.wait_for(lambda: not self._running)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._running -= 1
                    self._lock.notify_all()
                    return
                file = self._wanted.popleft()
            # It is fetched once more when it is read, and what is wrong is said then.
            with contextlib.suppress(CacheError, OSError):
                self._fetch(file)
