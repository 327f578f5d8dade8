"""A process serves what is promoted and whole; what is broken is named, and the old version goes on."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from deployments.rollout import Rollout
from recsys.errors import BundleError, VersionAbsentError
from tests.deployments.standin import StandIn, StandInRegistry

V1, V2, V3, V4 = (f"v{n:06d}-aaaaaaaa" for n in range(1, 5))


def started(registry: StandInRegistry, **given: object) -> Rollout:
    rollout = Rollout(registry, registry.load(), poll_s=3600, **given)  # type: ignore[arg-type]
    rollout.start()
    rollout.stop()
    return rollout


def registry(production: str = V1) -> StandInRegistry:
    found = StandInRegistry(**{v: StandIn(v) for v in (V1, V2, V3, V4)})
    found.named = {"production": production}
    return found


def test_a_promoted_version_serves_and_its_predecessor_stays() -> None:
    held = registry()
    rollout = started(held)
    assert rollout.current == V1
    held.named = {"production": V2, "previous": V1}
    rollout.poll()
    assert rollout.current == V2
    assert rollout.held == [V2, V1]
    assert rollout.funnel().version == V2
    assert rollout.funnel(V1).version == V1


def test_a_version_that_is_not_held_is_a_typed_error() -> None:
    with pytest.raises(VersionAbsentError, match=f"Version '{V3}' is not held here. Held: {V1}"):
        started(registry()).funnel(V3)


def test_a_broken_version_is_refused_by_name_and_the_old_one_serves() -> None:
    held = registry()
    rollout = started(held)
    held.held[V2] = BundleError("'vectors.npy' was changed after it was written")
    held.named = {"production": V2, "previous": V1}
    rollout.poll()
    assert rollout.current == V1
    assert rollout.refused == {V2: "'vectors.npy' was changed after it was written"}


def test_a_refused_version_is_tried_again_once_it_was_promoted_anew() -> None:
    held = registry()
    rollout = started(held)
    held.held[V2] = BundleError("broken")
    held.named = {"production": V2, "previous": V1}
    rollout.poll()
    held.named = {"production": V1}
    rollout.poll()
    assert rollout.refused == {}
    held.held[V2] = StandIn(V2)
    held.named = {"production": V2, "previous": V1}
    rollout.poll()
    assert rollout.current == V2


def away() -> BundleError:
    """What a registry behind a URI says when its store does not answer."""
    error = BundleError("The registry 's3://b' does not answer (timed out).")
    error.__cause__ = OSError("timed out")
    return error


@pytest.mark.parametrize("passing", [away(), OSError(28, "No space left on device"), MemoryError()], ids=repr)
def test_what_may_pass_by_itself_is_tried_again_after_a_growing_pause(monkeypatch: pytest.MonkeyPatch, passing: Exception) -> None:
    """Polled every second: tried at 0 s, and 5, 10 and 20 s after the try before; at 36 s the way is free, and it waits until 75 s."""
    now, tried = [1_000.0], []
    monkeypatch.setattr("deployments.rollout.time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: 0.0, time=time.time))
    held = registry()
    rollout = started(held)
    held.held[V2] = passing
    held.named = {"production": V2, "previous": V1}
    load = rollout._load
    rollout._load = lambda folder: tried.append(now[0] - 1_000.0) or load(folder)  # type: ignore[func-returns-value]
    for second in range(80):
        now[0] = 1_000.0 + second
        if second == 36:
            held.held[V2] = StandIn(V2)
        rollout.poll()
        assert (rollout.current, V2 in rollout.refused) == ((V1, True) if second < 75 else (V2, False))
    assert tried == [0.0, 5.0, 15.0, 35.0, 75.0]


def test_a_fault_of_the_bundle_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000.0]
    monkeypatch.setattr("deployments.rollout.time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: 0.0, time=time.time))
    held = registry()
    rollout = started(held)
    held.held[V2] = BundleError("'vectors.npy' was changed after it was written")
    held.named = {"production": V2, "previous": V1}
    rollout.poll()
    held.held[V2] = StandIn(V2)
    now[0] += 1e6
    rollout.poll()
    assert rollout.current == V1


def test_a_start_on_a_broken_version_serves_the_previous_one() -> None:
    held = registry()
    held.held[V2] = BundleError("broken")
    held.named = {"production": V2, "previous": V1}
    rollout = started(held)
    assert rollout.current == V1
    assert rollout.refused == {V2: "broken"}


@pytest.mark.parametrize(
    ("named", "text"), [({}, "the registry 'here' has no production version"), ({"production": V4}, "broken beyond use")]
)
def test_a_start_on_nothing_says_what_to_do(named: dict[str, str], text: str) -> None:
    held = registry()
    held.held[V4] = BundleError("broken beyond use")
    held.named = named
    with pytest.raises(BundleError, match=f"There is nothing to serve: {text}. Train and promote a version first: rayfunnel train -c FILE"):
        started(held)


def test_a_gateway_waits_until_the_stages_hold_the_version() -> None:
    held, answers = registry(), ["fine_rank: still loading", None]
    rollout = started(held, ready=lambda _: answers.pop(0))
    held.named = {"production": V2, "previous": V1}
    rollout.poll()
    assert rollout.current == V1
    assert V2 in rollout.held  # loaded here, and waiting
    rollout.poll()
    assert rollout.current == V2


def test_memory_holds_three_versions_and_the_serving_one_always() -> None:
    held = registry()
    rollout = started(held)
    for new, old in ((V2, V1), (V3, V2), (V4, V3)):
        held.named = {"production": new, "previous": old}
        rollout.poll()
    assert rollout.held == [V4, V3, V2]


def test_a_canary_is_held_beside_and_stands_in_for_nobody() -> None:
    held = registry()
    rollout = started(held)
    held.named = {"production": V2, "previous": V1, "canary": V3}
    rollout.poll()
    assert (rollout.held, rollout.promoted) == ([V2, V3, V1], [V2, V1])
    held.named = {"production": V2, "previous": V1}
    rollout.poll()
    assert (rollout.held, rollout.promoted) == ([V2, V1], [V2, V1]), "let go of at once, and no stand-in on its way out"
    held.named = {"production": V2, "previous": V1, "canary": V3}
    rollout.poll()
    held.named = {"production": V3, "previous": V2, "canary": V3}
    rollout.poll()
    assert (rollout.current, rollout.promoted) == (V3, [V3, V2, V1])


def test_a_registry_that_cannot_be_read_leaves_the_version_serving() -> None:
    held = registry()
    rollout = Rollout(held, held.load(), poll_s=0.01)  # type: ignore[arg-type]
    rollout.start()
    aliases = held.aliases

    def unreadable() -> dict[str, str]:
        raise BundleError("aliases.json is damaged")

    held.aliases = unreadable  # type: ignore[method-assign]
    time.sleep(0.1)
    assert rollout.alive
    assert rollout.current == V1
    held.aliases = aliases  # type: ignore[method-assign]
    held.named = {"production": V2, "previous": V1}
    patience = time.monotonic() + 10
    while rollout.current != V2 and time.monotonic() < patience:
        time.sleep(0.01)
    assert rollout.current == V2
    rollout.stop()
