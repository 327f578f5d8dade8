"""Commands of the registry: publish, promote, roll back, list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from cluster.terminal import ConfigFiles, Settings, load, next_step, out, registry
from recsys.errors import ConfigError

SHOWN_METRICS = ("ndcg@10", "recall@10", "hit@10", "mrr@10", "auc", "gauc")
"""What `versions` shows of a version's quality, where it was measured."""


def publish(
    config: ConfigFiles,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="FOLDER", help="A bundle from elsewhere. Default: the newest training.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Put a trained bundle into the registry as its next version, whole or not at all.

    Example: rayfunnel publish -c configs/movielens.yaml --folder /mnt/other/registry/bundles/v000007-0a1b2c3d
    """
    if folder is None:
        from cluster import pipeline

        version = pipeline.publish(load(config, settings), out)
    else:
        version = registry(config, settings).publish(folder)
    out.print(f"Published [bold]{version}[/]. Put it to work:")
    out.print(f"  {next_step(f'promote {version}', config, settings)}", markup=False, highlight=False, soft_wrap=True)


def promote(
    config: ConfigFiles,
    version: Annotated[
        str | None, typer.Argument(help="latest, a number, or the name of a version or its beginning. Default: latest.", show_default=False)
    ] = None,
    settings: Settings = None,
    canary: Annotated[
        bool, typer.Option("--canary", help="Make it the canary instead: services load and check it. It gets no traffic yet.")
    ] = False,
    drop_canary: Annotated[
        bool, typer.Option("--drop-canary", help="Promote nothing; let no version be the canary. Services let go of it.")
    ] = False,
) -> None:
    """Verify a version and make it production. A running service takes it up within seconds.

    A canary is loaded by every service, and refused there where it is broken (GET /v1/version says so); requests are not
    split between it and production yet.

    Examples: rayfunnel promote -c configs/movielens.yaml, or with a version: rayfunnel promote -c configs/movielens.yaml 3
    """
    if drop_canary:
        if canary or version is not None:
            raise ConfigError("--drop-canary promotes nothing: give it neither a version nor --canary.")
        dropped = registry(config, settings).drop_alias("canary")
        out.print(f"[bold]{dropped}[/] is no longer canary" if dropped else "No version was canary")
        return
    alias: Literal["canary", "production"] = "canary" if canary else "production"
    out.print(f"[bold]{registry(config, settings).promote(version or 'latest', alias=alias)}[/] is {alias}")


def rollback(config: ConfigFiles, settings: Settings = None) -> None:
    """Make the previous version production again. A second rollback goes forward.

    Example: rayfunnel rollback -c configs/movielens.yaml
    """
    out.print(f"[bold]{registry(config, settings).rollback()}[/] is production again")


def versions(config: ConfigFiles, settings: Settings = None) -> None:
    """List what is published, newest first, with aliases and measured quality.

    Example: rayfunnel versions -c configs/movielens.yaml
    """
    held = registry(config, settings)
    found = held.list()
    if not found:
        out.print(f"No version in {held.where} yet. Publish one:")
        out.print(f"  {next_step('train', config, settings)}", markup=False, highlight=False, soft_wrap=True)
        return
    measured = {name for listed in found for name, value in listed.manifest.metrics.items() if isinstance(value, float)}
    names = [name for name in SHOWN_METRICS if name in measured] or sorted(measured)[:4]
    table = Table("version", "is", "created", "MB", *names, header_style="bold")
    for listed in found:
        metrics = [f"{value:.4f}" if isinstance(value := listed.manifest.metrics.get(name), float) else "" for name in names]
        table.add_row(listed.version, ", ".join(listed.aliases), listed.manifest.created, f"{listed.bytes / 1e6:.1f}", *metrics)
    out.print(table)
