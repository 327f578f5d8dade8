"""A bundle answers as the funnel that was trained: what writing or reading loses or reorders is refused, first when it is published."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deployments.rollout import loader
from recsys import bundle as bundles
from recsys import channels, packing
from recsys.config import Config
from recsys.core import Vocabulary
from recsys.errors import BundleError
from recsys.features.stream import Stream
from recsys.funnel import STAGES, Funnel, Past
from tests.small import config_of, recipe_of, write_data

AGGREGATES = {"item_n": {"kind": "count", "key": "item"}, "user_n": {"kind": "count", "key": "user"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    write_data(folder)
    steps = recipe_of(config_of(folder, f"features.aggregates={json.dumps(AGGREGATES)}"))
    return steps, steps.final()


def written(trained, folder: Path) -> Path:
    steps, final = trained
    return bundles.write(folder / "v1", lambda f: packing.pack(final, f, tower=steps.final_tower, ranker=steps.ranker))[0]


def sorted_channels(patch: pytest.MonkeyPatch) -> None:
    """What a configuration did that came back sorted: each channel was read as another's evidence."""
    honest = channels.load
    patch.setattr(channels, "load", lambda configs, *rest: honest({name: configs[name] for name in sorted(configs)}, *rest))


def lost_channel(patch: pytest.MonkeyPatch) -> None:
    honest = channels.load
    patch.setattr(channels, "load", lambda configs, *rest: honest(dict(list(configs.items())[1:]), *rest))


def items_of_other_rows(patch: pytest.MonkeyPatch) -> None:
    honest = Vocabulary.load.__func__

    def load(cls: type[Vocabulary], folder: Path, name: str) -> Vocabulary:
        found: Vocabulary = honest(cls, folder, name)
        return Vocabulary(found.ids[::-1]) if name == "items" else found

    patch.setattr(Vocabulary, "load", classmethod(load))


def lost_pasts(patch: pytest.MonkeyPatch) -> None:
    honest = Past.load.__func__

    def load(cls: type[Past], folder: Path) -> Past:
        found: Past = honest(cls, folder)
        return found._replace(indptr=np.zeros_like(found.indptr), times=np.array(found.times))

    patch.setattr(Past, "load", classmethod(load))


def lost_counters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "unpack", lambda *_: {})


BROKEN = (sorted_channels, lost_channel, items_of_other_rows, lost_pasts, lost_counters)


def test_a_bundle_that_is_whole_answers_as_the_trained_funnel_did(trained, tmp_path):
    folder = written(trained, tmp_path)
    golden = json.loads((folder / packing.GOLDEN).read_text())
    for then, now in zip(golden["answers"], packing.answers(trained[1], golden["requests"], golden["at"]), strict=True):
        assert then["items"] == now["items"]
        np.testing.assert_allclose(then["scores"], now["scores"], atol=1e-4)
    assert packing.differences(Funnel.load(folder), folder) == []
    loader(*STAGES)(folder)


def test_a_bundle_holds_no_address_and_no_password_of_where_it_was_made(trained, tmp_path):
    steps, final = trained
    log = {"type": "kafka", "servers": "broker:9092", "options": {"sasl.password": "hunter2"}}
    given = {"redis_url": "redis://db?password=hunter2", "ingest": {"log": log}, "store": {"prefix": "mine"}, "serve": {"host": "10.0.0.7"}}
    elsewhere = replace(final, config=Config.model_validate(final.config.document() | given))
    folder = written((steps, elsewhere), tmp_path)
    for text in ((folder / "config.json").read_text(), (folder / bundles.MANIFEST).read_text()):
        for told in ("hunter2", "broker:9092", "10.0.0.7", '"mine"', "redis_url"):
            assert told not in text


@pytest.mark.parametrize("breaks", BROKEN)
def test_what_loading_reorders_or_loses_is_refused_at_load(trained, tmp_path, monkeypatch, breaks: Callable[[pytest.MonkeyPatch], None]):
    folder = written(trained, tmp_path)
    breaks(monkeypatch)
    with pytest.raises(BundleError, match=r"answers otherwise than when it was published \((user '|no request).*Publish it again"):
        loader(*STAGES)(folder)


@pytest.mark.parametrize("breaks", BROKEN)
def test_and_is_not_published_at_all_where_the_publisher_already_meets_it(trained, tmp_path, monkeypatch, breaks):
    breaks(monkeypatch)
    with pytest.raises(BundleError, match=r"does not answer as the trained funnel does \((user '|no request).*Nothing is published"):
        written(trained, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_items_that_changed_their_scores_among_themselves_are_told_though_the_scores_are_the_same(trained, tmp_path):
    folder = written(trained, tmp_path)
    golden = json.loads((folder / packing.GOLDEN).read_text())
    for answer in golden["answers"]:
        answer["items"] = answer["items"][::-1]
    (folder / packing.GOLDEN).write_text(json.dumps(golden))
    assert "items have each other's scores" in packing.differences(Funnel.load(folder), folder)[0]
    for answer in golden["answers"]:
        answer["items"] = [f"other {i}" for i in answer["items"]]
    (folder / packing.GOLDEN).write_text(json.dumps(golden))
    assert "10 of 10 items were not on the page when published" in packing.differences(Funnel.load(folder), folder)[0]
