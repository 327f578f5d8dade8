"""The registry: versions of bundles that never change, and the aliases production, previous and canary that do.

    registry/bundles/v000003-1a2b3c4d/    number in order of publishing, first digits of the content hash
    registry/numbers/000003               taken by creating it exclusively, so two publishers never share a number
    registry/aliases.json                 replaced atomically; a watcher needs to read nothing else

A location may also be a URI (s3://, gs://, hdfs://, anything fsspec knows): `cluster.remote_registry` has its rules.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recsys import bundle
from recsys.bundle import Manifest
from recsys.config_faults import nearest
from recsys.errors import BundleError

Alias = Literal["production", "canary", "previous"]
ALIASES: tuple[Alias, ...] = ("production", "canary", "previous")
VERSION = re.compile(r"v(\d{6,})-([0-9a-f]{8})")
Fill = Callable[[Path], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Listed:
    """One line of `versions`."""

    manifest: Manifest
    aliases: tuple[str, ...]

    @property
    def version(self) -> str:
        """Its name."""
        return self.manifest.version

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(entry.bytes for entry in self.manifest.files.values())


class Registry:
    """A registry in a local (or mounted) folder. Every method may be called from any number of processes."""

    def __init__(self, location: str | Path) -> None:
        self.root = Path(location)
        self.where = str(location)
        """How messages name this registry."""
        self._read: tuple[tuple[int, int, int], dict[str, str]] | None = None

    @property
    def bundles(self) -> Path:
        """The folder of all versions."""
        return self.root / "bundles"

    # Reading.

    def versions(self) -> list[str]:
        """Every complete version, oldest first."""
        if not self.bundles.is_dir():
            return []
        return sorted((p.name for p in self.bundles.iterdir() if VERSION.fullmatch(p.name)), key=number_of)

    def aliases(self) -> dict[str, str]:
        """Alias -> version. Cheap enough for every second: the file is read only when its stat changed."""
        path = self.root / "aliases.json"
        try:
            stat = path.stat()
            key = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if self._read is None or self._read[0] != key:
                self._read = (key, parse_aliases(path.read_text("utf-8"), str(path)))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise BundleError(f"'{path}' cannot be read ({error}). Check its owner and permissions.") from error
        return dict(self._read[1])

    def resolve(self, name: str) -> str:
        """The version meant by an alias, `latest`, a number (3), a full name, or the unique beginning of a name or hash."""
        known = self.versions()
        if name in ALIASES:
            if (found := self.aliases().get(name)) is None:
                raise BundleError(f"No version is {name} in '{self.where}'. {_advice(known)}")
            return found
        if name == "latest" and known:
            return known[-1]
        wanted = name.removeprefix("v")
        matches = [v for v in known if v == name or (wanted.isdigit() and number_of(v) == int(wanted))] or [
            v for v in known if v.startswith(name) or v.partition("-")[2].startswith(name)
        ]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise BundleError(f"'{name}' could be any of {', '.join(matches)}. Give more of the name.")
        near = nearest(name, [*known, *ALIASES, *(["latest"] if known else [])])
        raise BundleError(f"'{self.where}' has no version '{name}'. " + (f"Did you mean '{near}'?" if near else _advice(known)))

    def local_copy(self, name: str, *, contents: bool = True) -> Path:
        """The folder of a version, verified. `contents=False` checks presence and sizes only."""
        folder = self.bundles / self.resolve(name)
        bundle.verify(folder, contents=contents)
        return folder

    def manifest(self, name: str) -> Manifest:
        """The manifest of a version."""
        return bundle.read_manifest(self.bundles / self.resolve(name))

    def list(self) -> list[Listed]:
        """Every version with its aliases, newest first. A damaged manifest is a BundleError of `manifest`, not of the list."""
        aliases = self.aliases()
        found = []
        for version in reversed(self.versions()):
            with contextlib.suppress(BundleError):
                found.append(Listed(self.manifest(version), tuple(a for a in ALIASES if aliases.get(a) == version)))
        return found

    # Writing.

    def publish(self, source: Path | Fill, **fields: Any) -> str:
        """Publish a bundle folder, or what `source(folder)` writes into an empty one, as the next version; returns its name.

        `fields` are Manifest fields. Nothing half-published can be seen, whatever fails. BundleError where it fails.
        """
        fill, fields = (_copying(source), _inherited(source) | fields) if isinstance(source, Path) else (source, fields)
        bundle.sweep(self.bundles)
        reserved: list[Path] = []

        def named(content: str) -> Path:
            reserved.append(self._reserve())
            return self.bundles / f"v{reserved[-1].name}-{content[:8]}"

        try:
            folder, _ = bundle.write(named, fill, parent=self.bundles, **fields)
        except BaseException:
            for number in reserved:
                number.unlink(missing_ok=True)
            raise
        return folder.name

    def promote(self, name: str = "latest", *, alias: Literal["production", "canary"] = "production") -> str:
        """Point the alias at a version that proves whole; production's old version becomes previous. Returns the version.

        A damaged bundle is refused with BundleError, and the alias stays where it was.
        """
        version = self.resolve(name)
        try:
            self.local_copy(version)
        except BundleError as error:
            held = self.aliases().get(alias)
            stays = f"{alias} stays {held}" if held else f"nothing is {alias}"
            raise BundleError(f"{version} is not promoted, {stays}. {error}") from error
        with self._changing() as aliases:
            if alias == "production" and aliases.get("production") not in {None, version}:
                aliases["previous"] = aliases["production"]
            aliases[alias] = version
        return version

    def promote_first(self, version: str) -> bool:
        """Promote the version if nothing is production yet; whether it was."""
        if self.aliases().get("production") is not None:
            return False
        self.promote(version)
        return True

    def rollback(self) -> str:
        """Make the previous version production again, and production previous; returns the new production."""
        target = self.aliases().get("previous")
        if target is None:
            raise BundleError(
                f"There is no previous version in '{self.where}' to go back to. Promote another one by name: {_advice(self.versions())}"
            )
        return self.promote(target)

    def drop_alias(self, alias: Literal["canary"]) -> str | None:
        """Take the alias away; its version stays. Returns the version it stood at, if any."""
        with self._changing() as aliases:
            return aliases.pop(alias, None)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, str]]:
        """The aliases, to be changed and written back as one step; others wait."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                aliases = self.aliases()
                yield aliases
                replace_durably(self.root / "aliases.json", json.dumps(aliases, indent=2, sort_keys=True) + "\n")
        except OSError as error:
            raise BundleError(_why(error, self.root)) from error

    def _reserve(self) -> Path:
        """The next number, created exclusively."""
        numbers = self.root / "numbers"
        numbers.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name) for p in numbers.iterdir() if p.name.isdigit()] + [number_of(v) for v in self.versions()]
        number = max(taken, default=0)
        while True:
            number += 1
            path = numbers / f"{number:06d}"
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                return path


def replace_durably(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def parse_aliases(text: str, path: str) -> dict[str, str]:
    """The content of an aliases.json; BundleError where it is none."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BundleError(f"'{path}' is damaged ({error}). Remove it and promote a version again.") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) and VERSION.fullmatch(v) for v in found.values()):
        raise BundleError(f"'{path}' is damaged (expected names of versions). Remove it and promote a version again.")
    return found


def number_of(version: str) -> int:
    """The number in a version's name."""
    match = VERSION.fullmatch(version)
    return int(match[1]) if match else -1


def _copying(source: Path) -> Fill:
    def fill(folder: Path) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=lambda at, _: [bundle.MANIFEST] if Path(at) == source else [])

    return fill


def _inherited(source: Path) -> dict[str, Any]:
    """What the manifest of a published bundle says of itself; it must be whole. A bare folder says nothing."""
    if not source.is_dir():
        raise BundleError(f"'{source}' is not a folder. Name the folder of a bundle.")
    if not (source / bundle.MANIFEST).exists():
        return {}
    manifest = bundle.verify(source)
    own = {"version", "created", "content_hash", "code_version", "files", "checksum"}
    return {name: getattr(manifest, name) for name in Manifest.model_fields if name not in own}


def _advice(known: list[str]) -> str:
    return f"Versions: {', '.join(known[-5:])}." if known else "It holds no version yet; 'rayfunnel train -c FILE' publishes one."


def _why(error: OSError, root: Path) -> str:
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"No permission to change the registry '{root}' ({error}). Change its owner, or set another registry or workdir."
    return f"The registry '{root}' could not be changed ({error}). Nothing was changed."
