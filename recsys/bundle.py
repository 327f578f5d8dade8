"""A bundle is a folder with everything that answers a request, and a manifest that proves it is whole.

Written under a temporary name, fsynced, renamed: a folder that has its final name is complete, whatever was killed when.
No file in it is ever unpickled, so pickles are refused on both sides.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, ValidationError

from recsys.core import FrozenConfig
from recsys.errors import BundleError

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished-"
"""Prefix of a bundle that is being written; whoever lists bundles skips it."""
PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".joblib", ".ckpt"})


class FileEntry(FrozenConfig):
    """What a file must be."""

    sha256: str
    """Hex digest of its content."""
    bytes: int
    """Its size."""


class Manifest(FrozenConfig):
    """What a bundle is, where it came from, and what every file in it must be."""

    version: str
    """Name of the version; also the name of its folder in a registry."""
    created: str
    """UTC time of writing, ISO 8601."""
    content_hash: str
    """sha256 over the paths and digests of all files: equal content has an equal hash, whenever it was written."""
    code_version: str
    """Version of the package that wrote it."""
    schema_hash: str = ""
    """FeatureSpace.schema_hash: what the models' inputs are."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The configuration it was trained with, secrets masked."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """What the evaluation before publishing measured."""
    parent_version: str | None = None
    """The version whose weights it started from, if any."""
    parity: dict[str, float] = Field(default_factory=dict)
    """Largest difference between what was trained and what was exported, by part."""
    index_recall: float | None = None
    """Recall of the vector indexes against exact search: the least of them."""
    bytes_per_item: float | None = None
    """Resident bytes of item columns, vectors and index per item."""
    files: dict[str, FileEntry]
    """Relative path -> size and digest of every file but this one."""
    checksum: str = ""
    """sha256 of all fields above."""

    def digest(self) -> str:
        """The checksum this manifest must carry."""
        fields = self.model_dump(mode="json", exclude={"checksum"})
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write(
    target: Path | Callable[[str], Path],
    fill: Callable[[Path], Mapping[str, Any] | None],
    *,
    parent: Path | None = None,
    **fields: Any,
) -> tuple[Path, Manifest]:
    """Let `fill` write files into an empty folder, then publish the folder under its name, whole or not at all.

    `target` is that name, or a function of the content hash that gives it (with `parent`, the folder that it will lie in).
    `fields` are Manifest fields; `fill` may return more of them. Returns the folder and its manifest. Raises BundleError
    where the name is taken, the disk is full, permission is missing, or a pickle was written; nothing is left behind then.
    """
    home = parent if parent is not None else (target.parent if isinstance(target, Path) else Path())
    unfinished = home / f"{UNFINISHED}{uuid.uuid4().hex[:12]}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        fields |= fill(unfinished) or {}
        files = _survey(unfinished)
        content = content_hash(files)
        final = target if isinstance(target, Path) else target(content)
        manifest = Manifest(
            version=final.name,
            code_version=_code_version(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            content_hash=content,
            files=files,
            **fields,
        )
        manifest = manifest.model_copy(update={"checksum": manifest.digest()})
        (unfinished / MANIFEST).write_text(manifest.model_dump_json(indent=2))
        _sync_tree(unfinished)
        if final.exists():
            raise BundleError(f"Bundle '{final}' exists already. Bundles never change; publish under a new version.")
        unfinished.rename(final)
        _sync(home)
    except OSError as error:
        raise BundleError(_why(error, home)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return final, manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest, checked in itself. Raises BundleError where it is missing or damaged."""
    try:
        text = (folder / MANIFEST).read_text("utf-8")
    except FileNotFoundError:
        what = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise BundleError(f"Bundle '{folder}' {what}. Name a folder that 'publish' wrote.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"Bundle '{folder}': manifest.json cannot be read ({error}). Publish again, or promote another version."
        ) from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleError(f"Bundle '{folder}': manifest.json is damaged ({where}: {first['msg']}). Publish again.") from error
    if manifest.checksum != manifest.digest():
        raise BundleError(f"Bundle '{folder}': manifest.json was changed after it was written. Publish again, or promote another version.")
    return manifest


def verify(folder: Path, *, schema_hash: str | None = None, contents: bool = True) -> Manifest:
    """The manifest of a bundle that is exactly as it was written. `contents=False` trusts sizes instead of reading every byte.

    Raises BundleError naming the first file that is missing, changed, unexpected or a link, or another schema.
    """
    folder = Path(folder)
    if folder.is_symlink():
        raise BundleError(f"Bundle '{folder}' is a symbolic link. Name the folder itself.")
    manifest = read_manifest(folder)
    found = {path for path in _files(folder) if path != MANIFEST}
    for path in manifest.files:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
            raise BundleError(f"Bundle '{folder}' lists '{path}', which lies outside of it. Do not use this bundle.")
    if missing := sorted(set(manifest.files) - found):
        raise BundleError(f"Bundle '{folder}' lacks {_listed(missing)}. Publish again, or promote another version.")
    if extra := sorted(found - set(manifest.files)):
        raise BundleError(f"Bundle '{folder}' holds {_listed(extra)}, which its manifest does not know. Remove it, or publish again.")
    with ThreadPoolExecutor(4) as pool:  # hashlib lets go of the interpreter lock
        same = pool.map(lambda entry: _is(folder / entry[0], entry[1], contents), manifest.files.items())
        changed = sorted(path for path, good in zip(manifest.files, same, strict=True) if not good)
    if changed:
        raise BundleError(
            f"Bundle '{folder}': {_listed(changed)} was changed after it was written. Publish again, or promote another version."
        )
    if schema_hash is not None and manifest.schema_hash != schema_hash:
        raise BundleError(
            f"Bundle '{folder}' was built for schema {manifest.schema_hash[:12]}, this service uses {schema_hash[:12]}. "
            "Rebuild it, or promote the matching version."
        )
    return manifest


def content_hash(files: Mapping[str, FileEntry]) -> str:
    """sha256 over all paths and digests, in the order of the paths."""
    lines = "".join(f"{path}\0{files[path].sha256}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def sweep(home: Path, *, older_than_s: float = 86_400) -> None:
    """Remove what writers that were killed left behind in this folder."""
    now = datetime.now(UTC).timestamp()
    for left in home.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):  # another sweeper was faster, or it is not ours
            if now - left.stat().st_mtime > older_than_s:
                shutil.rmtree(left)


def _survey(folder: Path) -> dict[str, FileEntry]:
    paths = sorted(_files(folder))
    if not paths:
        raise BundleError("A bundle needs at least one file; nothing was written into it.")
    if pickles := [path for path in paths if PurePosixPath(path).suffix in PICKLES]:
        raise BundleError(f"A bundle must not hold pickles, got {_listed(pickles)}. Use safetensors, .npy, Arrow or JSON.")
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda path: file_hash(folder / path), paths))
    return {path: FileEntry(sha256=digest, bytes=(folder / path).stat().st_size) for path, digest in zip(paths, digests, strict=True)}


def _files(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root) / name
            if path.is_symlink():
                raise BundleError(
                    f"Bundle '{folder}' holds a symbolic link, '{path.relative_to(folder)}'. A bundle holds plain files only."
                )
        for name in names:
            path = Path(root) / name
            if not path.is_file():
                raise BundleError(f"Bundle '{folder}': '{path.relative_to(folder)}' is neither a file nor a folder.")
            yield path.relative_to(folder).as_posix()


def file_hash(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is(path: Path, entry: FileEntry, contents: bool) -> bool:
    return path.stat().st_size == entry.bytes and (not contents or file_hash(path) == entry.sha256)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why(error: OSError, home: Path) -> str:
    """The sentence for a failed write. numpy reports a full disk without its errno, so the disk is asked too."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if error.errno in full or (error.errno is None and "written" in str(error)):
        return f"No space left under '{home}' to write a bundle ({error}). Nothing was published. Free some space and publish again."
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"No permission to write a bundle under '{home}' ({error}). Nothing was published. Change its owner, or set another registry or workdir."
    return f"Writing a bundle under '{home}' failed ({error}). Nothing was published."


def _code_version() -> str:
    try:
        return importlib.metadata.version("rayfunnel")
    except importlib.metadata.PackageNotFoundError:  # a copy of the source, as in a submitted job
        return "source"


def _listed(paths: list[str]) -> str:
    shown = ", ".join(f"'{path}'" for path in paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"
