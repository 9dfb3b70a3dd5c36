"""One way to read and write a folder, wherever it is: a local path or any fsspec URL (`s3://bucket/prefix`, …).

A `Store` is only its address, so it can be sent to any worker; credentials come from the environment there. Writes are
whole or absent: a local file is renamed into place, an object store shows an object when its upload has ended.

Two policies meet faults: `patient` (the default) retries, for work that must survive; `quick` gives up within
seconds, for questions asked before work starts.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow.fs
from botocore import exceptions as boto_errors

from infra.errors import EnvironmentFailure, InputError

Policy = Literal["patient", "quick"]

_QUICK = {"connect_timeout": 3, "read_timeout": 5, "retries": {"total_max_attempts": 2, "mode": "standard"}}
_PATIENT = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 5, "mode": "standard"}}

_NO_ROOM = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this machine allows",
}


@functools.cache
def _filesystem(scheme: str, policy: Policy, process: int) -> Any:
    """The fsspec file system of a scheme; one a process, because connections do not survive a fork."""
    if scheme in ("s3", "s3a"):
        import s3fs  # only a run on S3 pays for this import

        quick = policy == "quick"
        filesystem = s3fs.S3FileSystem(
            config_kwargs=_QUICK if quick else _PATIENT, use_listings_cache=False, skip_instance_cache=True
        )
        filesystem.retries = 1 if quick else 5  # times those of botocore above
        return filesystem
    try:
        if scheme in ("http", "https"):
            raise ValueError("it can only be read")
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"the scheme of {scheme}:// is not supported: {error}\nhint: a local folder, or s3://bucket/prefix"
        ) from error


def renew() -> None:
    """Forget connections: the next call opens new ones, with the credentials that are there by then.

    A client reads a credentials file once; one that waits for renewed credentials has to be made anew.
    """
    _filesystem.cache_clear()


@contextmanager
def _explained(action: str, url: str) -> Iterator[None]:
    """Turn what a disk or a store raises into two lines a user can act on."""
    try:
        yield
    except FileNotFoundError as error:
        if url.startswith("s3") and "bucket does not exist" in str(error):
            raise EnvironmentFailure(
                f"cannot {action} {url}: the bucket does not exist\nhint: create it, or correct the root's name"
            ) from error
        if action != "write":
            raise  # an answer to whoever asks for a file
        raise EnvironmentFailure(f"cannot write {url}: {error}\nhint: choose a root that can be written") from error
    except PermissionError as error:
        raise EnvironmentFailure(
            f"cannot {action} {url}: permission denied ({error})\n"
            "hint: check the folder's owner, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for an object store"
        ) from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise EnvironmentFailure(
                f"cannot {action} {url}: {_NO_ROOM[error.errno]}\n"
                "hint: free some space or choose another --root; earlier artifacts are intact, the same command goes on"
            ) from error
        if error.errno in (errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EIO, errno.ENAMETOOLONG):
            raise EnvironmentFailure(
                f"cannot {action} {url}: {error}\nhint: choose a root that can be written"
            ) from error
        if url.startswith(("/", "file:")):
            raise
        raise EnvironmentFailure(_store_message(action, url, error)) from error
    except (boto_errors.BotoCoreError, boto_errors.ClientError) as error:
        raise EnvironmentFailure(_store_message(action, url, error)) from error
    except Exception as error:
        aiohttp = sys.modules.get("aiohttp")  # which s3fs lets through when an answer breaks off in the middle
        if aiohttp is None or not isinstance(error, aiohttp.ClientError):
            raise
        raise EnvironmentFailure(_store_message(action, url, error)) from error


def _is_refused_condition(error: BaseException | None) -> bool:
    """Whether an object store refused a conditional write because somebody else was first."""
    while error is not None:
        if isinstance(error, boto_errors.ClientError):
            return error.response.get("Error", {}).get("Code") in ("PreconditionFailed", "ConditionalRequestConflict")
        error = error.__cause__ or error.__context__
    return False


def place_new(partial: Path, target: Path) -> bool:
    """Give a complete local file its name unless there is one of that name; whether it was given.

    A file system without hard links is asked to create the name alone first, which is as exclusive, but leaves an empty
    file when the machine stops in between.
    """
    try:
        os.link(partial, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            return False
        partial.replace(target)
    return True


def _write_through(path: Path, content: bytes) -> None:
    """Write a local file so that a crash of the machine cannot leave it half there."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _store_message(action: str, url: str, error: Exception) -> str:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the default AWS endpoint"
    if isinstance(error, boto_errors.NoCredentialsError):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"
    else:
        remedy = "check AWS_ENDPOINT_URL, the bucket's name and the keys"
    reason = " ".join(str(error).split())
    return f"cannot {action} {url} at {endpoint}: {reason}\nhint: {remedy}"


@dataclass(frozen=True)
class Store:
    """A folder on a disk or an object store. `url` has no trailing slash; a local one is an absolute path."""

    url: str
    policy: Policy = "patient"
    elsewhere: tuple[tuple[str, str], ...] = ()
    """(name, URL) of folders that lie elsewhere: `child` finds them there, listings and deletions leave them out."""

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on this machine's file system."""
        return "://" not in self.url

    @property
    def path(self) -> Path:
        """The local folder.

        Raises:
            InputError: the store is remote.
        """
        if not self.is_local:
            raise InputError(f"{self.url} is not a local folder\nhint: give a path on this machine")
        return Path(self.url)

    @property
    def _fs(self) -> Any:
        scheme = "file" if self.is_local else self.url.split("://", 1)[0]
        return _filesystem(scheme, self.policy, os.getpid())

    def _key(self, name: str = "") -> str:
        bare = self.url.split("://", 1)[-1]
        return f"{bare}/{name}" if name else bare

    def child(self, *parts: str) -> Store:
        """The store of a sub-folder (which need not exist)."""
        names = [part.strip("/") for part in parts]
        for name, url in self.elsewhere:
            if names and names[0] == name:
                return Store("/".join([url, *names[1:]]), self.policy)
        return Store("/".join([self.url, *names]), self.policy)

    def sharing(self, **folders: Store) -> Store:
        """The same folder, with these sub-folders lying where the given stores are."""
        return replace(self, elsewhere=tuple((name, store.url) for name, store in folders.items()))

    def quick(self) -> Store:
        """The same folder, asked with little patience."""
        return replace(self, policy="quick")

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """A pyarrow file system and the folder's path in it, for Ray and parquet."""
        if self.is_local:
            return pyarrow.fs.LocalFileSystem(), self.url
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self._fs)), self._key()

    # ---- whole files ----

    def exists(self, name: str) -> bool:
        """Whether a file or a non-empty folder of this name is there."""
        with _explained("read", f"{self.url}/{name}"):
            return bool(self._fs.exists(self._key(name)))

    def read_bytes(self, name: str) -> bytes:
        """A file's content. FileNotFoundError when there is none."""
        with _explained("read", f"{self.url}/{name}"):
            return bytes(self._fs.cat_file(self._key(name)))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        with _explained("write", f"{self.url}/{name}"):
            if not self.is_local:
                self._fs.pipe_file(self._key(name), content)
                return
            with self._aside(name) as (partial, target):
                _write_through(partial, content)
                partial.replace(target)

    def create_bytes(self, name: str, content: bytes) -> bool:
        """Write a file that must not exist yet, whole or not at all; of several writers exactly one succeeds.

        On an object store this is a conditional write (`If-None-Match: *`), which AWS, SeaweedFS and Ceph honour. When
        the store's answer to a write got lost, the retry finds the own file; equal content therefore counts as
        success, and whoever needs to be the only winner puts something of his own into it.

        Returns:
            Whether the file is now there with this content because of this call.
        """
        if not self.is_local:
            with _explained("write", f"{self.url}/{name}"):
                try:
                    self._fs.pipe_file(self._key(name), content, mode="create")
                    return True
                except FileExistsError:
                    pass
                except OSError as error:
                    if not _is_refused_condition(error):
                        raise
            try:
                return self.read_bytes(name) == content
            except FileNotFoundError:  # the other one's, deleted since
                return False
        with _explained("write", f"{self.url}/{name}"), self._aside(name) as (partial, target):
            _write_through(partial, content)
            return place_new(partial, target)

    @contextmanager
    def _aside(self, name: str) -> Iterator[tuple[Path, Path]]:
        """A file beside the local one of this name, to be written first and gone afterwards; and that one."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            yield partial, target
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """A file to read from, seekable, as a context manager; only what is asked for is transferred."""
        with _explained("read", f"{self.url}/{name}"), self._fs.open(self._key(name), "rb") as file:
            yield file

    def read_json(self, name: str) -> Any:
        """A JSON file's value."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file with sorted keys, whole or not at all."""
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def delete(self, name: str = "") -> None:
        """Delete a file, or a folder with all it holds; nothing happens when there is none."""
        with _explained("delete", f"{self.url}/{name}"):
            if self.is_local:
                target = self.path / name if name else self.path
                if target.is_dir():
                    shutil.rmtree(target, ignore_errors=False)
                else:
                    target.unlink(missing_ok=True)
            elif self._fs.exists(self._key(name)):
                self._fs.rm(self._key(name), recursive=True)

    # ---- folders ----

    def files(self) -> dict[str, int]:
        """Sizes in bytes of all files below, by relative name, sorted; partial writes are not files."""
        with _explained("list", self.url):
            found = self._fs.find(self._key(), detail=True)
        prefix = self._key().rstrip("/") + "/"
        sizes = {key[len(prefix) :]: int(info["size"]) for key, info in found.items() if key.startswith(prefix)}
        # What ends with a slash is the marker that an S3 console leaves for an empty folder.
        return {name: sizes[name] for name in sorted(sizes) if name and not name.endswith((".partial", "/"))}

    def walk(self, below: str = "", entered: tuple[Path, ...] = ()) -> Iterator[tuple[str, int]]:
        """Relative name and bytes of every file below, one folder in memory at a time, in an order that does not vary.

        A link to a folder of this machine is followed, unless it leads back to where it lies.

        Args:
            below: only what lies in this sub-folder, which ends with a slash.
            entered: the folders whose links were followed to get there.
        """
        folder = self._key(below.rstrip("/"))
        with _explained("list", f"{self.url}/{below}"):
            found = self._fs.ls(folder, detail=True)
        for info in sorted(found, key=lambda info: str(info["name"])):
            key = str(info["name"]).rstrip("/")
            if key == folder:  # S3 may list the folder's own marker
                continue
            name = below + key.rsplit("/", 1)[-1]
            is_folder, through = info["type"] == "directory", entered
            if self.is_local and info.get("islink"):
                target = Path(key).resolve()
                is_folder, through = target.is_dir(), (*entered, Path(key).parent.resolve())
                if is_folder and any(above.is_relative_to(target) for above in through):
                    continue
            if is_folder:
                yield from self.walk(f"{name}/", through)
            elif not name.endswith(".partial"):
                yield name, int(info["size"] or 0)

    def is_empty(self) -> bool:
        """Whether no file lies below: some object stores show a folder after all it held is deleted."""
        try:
            return next(self.walk(), None) is None
        except (FileNotFoundError, NotADirectoryError):
            return True

    def children(self) -> list[str]:
        """Names of the files and folders directly below, sorted; empty when the folder does not exist."""
        with _explained("list", self.url):
            try:
                found = self._fs.ls(self._key(), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        keys = {str(key).rstrip("/") for key in found} - {self._key()}
        return sorted(name for key in keys if not (name := key.rsplit("/", 1)[-1]).endswith(".partial"))

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file here, whole or not at all."""
        with _explained("write", f"{self.url}/{name}"):
            if not self.is_local:
                self._fs.put_file(str(source), self._key(name))
                return
            with self._aside(name) as (partial, target):
                shutil.copyfile(source, partial)
                partial.replace(target)

    def download(self, name: str, target: Path) -> Path:
        """Copy a file to a local path (whole or absent) and return that path."""
        with _explained("read", f"{self.url}/{name}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
            os.close(handle)
            try:
                self._fs.get_file(self._key(name), partial)
                Path(partial).replace(target)
            finally:
                Path(partial).unlink(missing_ok=True)
        return target

    def upload_folder(self, source: Path) -> None:
        """Copy every file below a local folder here."""
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            self.upload(file, file.relative_to(source).as_posix())

    def download_folder(self, target: Path) -> Path:
        """Copy every file here to a local folder and return it; a local store is returned as it lies."""
        if self.is_local:
            return self.path
        for name in self.files():
            self.download(name, target / name)
        return target

    def sha256(self, name: str) -> str:
        """Hexadecimal SHA-256 of a file, read in blocks."""
        digest = hashlib.sha256()
        with _explained("read", f"{self.url}/{name}"), self._fs.open(self._key(name), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def check_writable(self) -> None:
        """Write, read back and delete a small file, giving up within seconds.

        Raises:
            EnvironmentFailure: the store cannot be reached or written.
        """
        probe, content = f".probe-{uuid.uuid4().hex}", b"hvqd"
        quick = self.quick()
        try:
            quick.write_bytes(probe, content)
            found = quick.read_bytes(probe)
            quick.delete(probe)
        except EnvironmentFailure as error:  # the user never asked for the probe
            raise EnvironmentFailure(str(error).replace(f"{self.url}/{probe}", self.url)) from error
        if found != content:
            raise EnvironmentFailure(f"{self.url} does not return what was written\nhint: check the store")


def open_store(url: str) -> Store:
    """The store at a path or URL; nothing is read or written.

    Raises:
        InputError: the URL's scheme is not supported, or nothing follows it.
    """
    if "://" not in url or url.startswith("file://"):
        return Store(str(Path(url.removeprefix("file://")).expanduser().resolve()))
    if not url.split("://", 1)[1].split("/", 1)[0]:
        raise InputError(f"the URL names no bucket: {url}\nhint: a local folder, or s3://bucket/prefix")
    store = Store(url.rstrip("/"))
    _ = store._fs
    return store
