"""A registry behind a URI, with every version it uses copied into a local cache and verified there.

An object store has no rename and no exclusive create. So a version's manifest is uploaded last, and only a folder with a
manifest counts; two publishers at the same moment may take one number, and their content hashes still tell them apart.
The last writer of the aliases wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from cluster.registry import VERSION, Fill, Registry, number_of, parse_aliases
from cluster.workdir import settle
from recsys import bundle
from recsys.bundle import MANIFEST, Manifest
from recsys.config_faults import redact
from recsys.errors import BundleError

log = logging.getLogger(__name__)


class RemoteRegistry(Registry):
    """A registry on any filesystem that pyarrow or fsspec knows."""

    def __init__(self, location: str, cache: Path | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(location.encode()).hexdigest()[:16]
        super().__init__(cache or home / "rayfunnel" / f"registry-{name}")
        self.where = redact(location)
        self._fs, self._path = _filesystem(location)

    def versions(self) -> list[str]:
        """Every complete version, oldest first."""
        selector = fs.FileSelector(f"{self._path}/bundles", allow_not_found=True)
        names = [info.base_name for info in self._asked(self._fs.get_file_info, selector) if VERSION.fullmatch(info.base_name)]
        manifests = self._asked(self._fs.get_file_info, [f"{self._path}/bundles/{name}/{MANIFEST}" for name in names])
        return sorted((name for name, info in zip(names, manifests, strict=True) if info.type == fs.FileType.File), key=number_of)

    def aliases(self) -> dict[str, str]:
        """Alias -> version: one small read."""
        text = self._text(f"{self._path}/aliases.json")
        return {} if text is None else parse_aliases(text, f"{self.where}/aliases.json")

    def manifest(self, name: str) -> Manifest:
        """The manifest of a version, by way of the cache."""
        version = self.resolve(name)
        cached = self.bundles / version
        if not cached.exists():
            text = self._text(f"{self._path}/bundles/{version}/{MANIFEST}")
            cached = self.root / "manifests" / version
            cached.mkdir(parents=True, exist_ok=True)
            (cached / MANIFEST).write_text(text or "")
        return bundle.read_manifest(cached)

    def local_copy(self, name: str, *, contents: bool = True) -> Path:
        """A verified copy of a version in the cache. A copy that was damaged is fetched again."""
        version = self.resolve(name)
        folder = self.bundles / version
        if folder.exists():
            with contextlib.suppress(BundleError):
                bundle.verify(folder, contents=contents)
                return folder
            log.warning("the cached copy of %s is damaged: fetching it again", version)
            _remove(folder)
        temporary = self.bundles / f"{bundle.UNFINISHED}{version}-{uuid.uuid4().hex[:8]}"
        try:
            temporary.mkdir(parents=True)
            self._asked(fs.copy_files, f"{self._path}/bundles/{version}", str(temporary), source_filesystem=self._fs)
            bundle.verify(temporary)
            settle(temporary, folder)  # the other processes of this host want it at the same moment
        finally:
            _remove(temporary)
        return folder

    def publish(self, source: Path | Fill, **fields: Any) -> str:
        """Write the next version in the cache, then upload it, manifest last."""
        version = super().publish(source, **fields)
        folder, target = self.bundles / version, f"{self._path}/bundles/{version}"
        try:
            for path in [*bundle.read_manifest(folder).files, MANIFEST]:
                at = f"{target}/{path}"
                self._fs.create_dir(at.rpartition("/")[0], recursive=True)
                with self._fs.open_output_stream(at) as sink:
                    sink.write(pa.py_buffer((folder / path).read_bytes()))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._fs.delete_dir(target)
            _remove(folder)
            raise BundleError(
                f"Uploading {version} to '{self.where}' failed ({redact(str(error))}). Nothing was published. Check access, then publish again."
            ) from error
        return version

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, str]]:
        aliases = self.aliases()
        yield aliases
        self._asked(self._put, f"{self._path}/aliases.json", json.dumps(aliases, indent=2, sort_keys=True).encode() + b"\n")

    def _put(self, path: str, content: bytes) -> None:
        with self._fs.open_output_stream(path) as sink:
            sink.write(content)

    def _text(self, path: str) -> str | None:
        def read() -> str:
            with self._fs.open_input_stream(path) as stream:
                return str(stream.read().decode("utf-8"))

        with contextlib.suppress(FileNotFoundError):
            return str(self._asked(read))
        return None

    def _asked(self, call: Any, *arguments: Any, **named: Any) -> Any:
        """The call's answer, its failures as sentences."""
        try:
            return call(*arguments, **named)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BundleError(
                f"The registry '{self.where}' does not answer ({redact(str(error))}). Check the address and your access to it."
            ) from error


def _filesystem(location: str) -> tuple[Any, str]:
    """pyarrow's own filesystem for the URI, else fsspec's."""
    try:
        filesystem, path = fs.FileSystem.from_uri(location)
    except pa.ArrowInvalid:
        import fsspec  # type: ignore[import-untyped]

        try:
            inner, path = fsspec.core.url_to_fs(location)
        except (ValueError, ImportError) as error:
            raise BundleError(
                f"The registry '{redact(location)}' cannot be opened ({error}). Give a folder, or a URI such as s3://bucket/path."
            ) from error
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(inner))
    except OSError as error:
        raise BundleError(f"The registry '{redact(location)}' cannot be opened ({redact(str(error))}).") from error
    return filesystem, str(path).rstrip("/")


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
