"""Public data sets: `fetch("ml-100k", folder)` gets the files, or says where they are from.

MovieLens-100k comes from the wheel of the package `recbole`, which carries it: one package index serves code and data, also
where nothing else can be reached. Only its data files are taken out; the package is not installed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from recsys.errors import DataError

log = logging.getLogger(__name__)

WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
IN_WHEEL = "recbole/dataset_example/ml-100k"
ML_100K = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
"""sha256 of each file."""
ML_100K_TERMS = "MovieLens 100K (GroupLens, University of Minnesota): for research use, not to be redistributed."
KUAIRAND_FILES = (
    "log_20220425_20220506.parquet",
    "user_features_pure.parquet",
    "video_features_basic_pure.parquet",
    "history_before_20220425.parquet",
)
TIMEOUT_S = 300

Download = Callable[[str, Path], Path]
"""(requirement, folder) -> the wheel it left there."""


def fetch(name: str, folder: Path) -> Path:
    """Make a public data set be in `folder` and give the folder that holds its files.

    ml-100k is fetched unless its files lie there whole. DataError says what to do where a set cannot be had.
    """
    if name == "ml-100k":
        return fetch_ml_100k(folder)
    raise DataError(f"There is no public data set '{name}' to fetch. Known: ml-100k. KuaiRand lies where KUAIRAND_DIR says.")


def fetch_ml_100k(folder: Path, download: Download | None = None) -> Path:
    """Put ml-100k.inter, .user and .item into `folder`; whole files that are there are kept."""
    log.info(ML_100K_TERMS)
    if all(sha256(folder / file) == digest for file, digest in ML_100K.items()):
        log.info("ml-100k: the files in %s are whole", folder)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        wheel = (download or pip_download)(WHEEL, Path(scratch))
        if (got := sha256(wheel)) != WHEEL_SHA256:
            raise DataError(
                f"The wheel of {WHEEL} has sha256 {got}, expected {WHEEL_SHA256}. It is damaged or not the published one; nothing was kept."
            )
        with zipfile.ZipFile(wheel) as archive:
            for file, digest in ML_100K.items():
                part = Path(scratch) / file
                part.write_bytes(archive.read(f"{IN_WHEEL}/{file}"))
                if sha256(part) != digest:
                    raise DataError(f"'{file}' of {WHEEL} is damaged (sha256 is not {digest}); nothing was kept of it.")
                part.replace(folder / file)
    log.info("ml-100k: fetched into %s", folder)
    return folder


def pip_download(requirement: str, folder: Path) -> Path:
    """Let pip get one wheel, without what it depends on."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "-q",
        "-d",
        str(folder),
        requirement,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        fault = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        fault = [f"no answer within {TIMEOUT_S} s"]
    found = sorted(folder.glob("*.whl"))
    if fault or not found:
        why = fault[0] if fault else "pip left no wheel"
        raise DataError(
            f"ml-100k: pip could not download {requirement} ({why}). Check the connection and pip's index; or put "
            f"{', '.join(ML_100K)} (in the wheel under {IN_WHEEL}/) into '{folder.parent}' by hand."
        )
    return found[0]


def find_kuairand() -> Path:
    """The folder of the KuaiRand slice, which KUAIRAND_DIR names; or DataError with where it is from."""
    if not (given := os.environ.get("KUAIRAND_DIR")):
        raise DataError("kuairand: KUAIRAND_DIR is not set. Let it name the folder of the slice; the README says what lies there.")
    folder = Path(given)
    missing = [file for file in KUAIRAND_FILES if not (folder / file).is_file()]
    if missing:
        raise DataError(
            f"kuairand: '{folder}' lacks {', '.join(missing)}. KuaiRand-Pure (Gao et al., CIKM 2022, CC BY-SA 4.0) is published at kuairand.com as csv "
            "files: download KuaiRand-Pure, point KUAIRAND_DIR at the folder with the files, and name them in the configuration (format: kuairand takes csv "
            "and Parquet)."
        )
    return folder


def sha256(path: Path) -> str | None:
    """The sha256 of a file in hex, or None where there is no file."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
