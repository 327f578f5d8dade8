"""Configurations: layers, lines, nearest names, and a manual that cannot disagree with the code."""

import json
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from recsys.config import CHANNELS, Config, load, manual, read, written
from recsys.config_faults import dotted_paths, redact
from recsys.config_file import Reader, read_as
from recsys.config_manual import document
from recsys.errors import ConfigError
from recsys.ingest_config import KafkaLogConfig
from recsys.places import OnlyPlaces

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = "data: {interactions: {path: log.csv}}\n"


def file(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    """A configuration file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def faults(path: Path, *settings: str) -> list[str]:
    """The faults as sentences, without the folder."""
    return [str(fault).replace(f"{path.parent}/", "") for fault in read([path], settings).faults]


# The manual.


def test_base_yaml_is_what_the_classes_say() -> None:
    assert (CONFIGS / "base.yaml").read_text() == manual(), "run: python -m recsys.config > configs/base.yaml"


def test_base_yaml_holds_the_default_of_every_key(tmp_path: Path) -> None:
    by_code = Config.model_validate(yaml.safe_load(MINIMAL))
    for text in (MINIMAL, f"extends: {CONFIGS}/base.yaml\n{MINIMAL}"):
        assert load([file(tmp_path, text)]).model_dump() == by_code.model_dump()


def test_every_key_of_every_section_is_documented() -> None:
    silent, seen = [], set()

    def look(schema: type[BaseModel]) -> None:
        if schema in seen:
            return
        seen.add(schema)
        for name, info in schema.model_fields.items():
            if not info.description and name != "type":
                silent.append(f"{schema.__name__}.{name}")
            for inner in _models(info.annotation):
                look(inner)

    look(Config)
    assert silent == []
    assert len(seen) > 25


def _models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models(inner)]


def test_the_example_of_the_data_section_can_be_taken_over(tmp_path: Path) -> None:
    text = "\n".join(line[1:] if line.startswith(("#data:", "#  ")) else line for line in manual().splitlines())
    example = yaml.safe_load(text.replace("extends:", "x:"))["data"]
    assert example["interactions"]["path"] == "log.csv"
    assert example["items"]["columns"]["price"]["kind"] == "number"
    assert set(example) == {"interactions", "labels", "refusals", "events", "impressions", "items", "users", "history"}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name != "base.yaml"))
def test_every_shipped_configuration_is_sound(name: str) -> None:
    assert faults(CONFIGS / name) == []


@pytest.mark.parametrize("path", sorted((CONFIGS / "tune").glob("*.yaml")), ids=lambda path: path.name)
def test_every_path_of_a_search_space_is_a_key(path: Path) -> None:
    searched = yaml.safe_load(path.read_text())["parameters"]
    assert set(searched) - set(dotted_paths(Config)) == set()


def test_base_yaml_alone_lacks_only_the_data() -> None:
    assert [fault.path for fault in read([CONFIGS / "base.yaml"]).faults] == ["data"]


# Layers.


def test_a_file_extends_another_and_an_overlay_wins_over_both(tmp_path: Path) -> None:
    file(tmp_path, MINIMAL + "seed: 7\nfine_rank: {keep: 50, training: {epochs: 2}}\n", "parent.yaml")
    child = file(tmp_path, "extends: parent.yaml\nname: child\nfine_rank: {training: {epochs: 3}}\n")
    overlay = file(tmp_path, "fine_rank: {training: {batch_size: 512}}\n", "overlay.yaml")
    config = load([child, overlay], ["fine_rank.training.learning_rate=1e-3", "name=other"])
    assert (config.name, config.seed, config.fine_rank.keep) == ("other", 7, 50)
    training = config.fine_rank.training
    assert (training.epochs, training.batch_size, training.learning_rate) == (3, 512, 0.001)


def test_defaults_lie_under_a_file_that_extends_nothing(tmp_path: Path) -> None:
    path = file(tmp_path, MINIMAL + "recall: {channels: {item_cf: {neighbors: 7}}}\nfine_rank: {model: {dim: 3}}\n")
    config = load([path], ["recall.channels.popular=null"])
    assert list(config.recall.channels) == ["two_tower", "item_cf", "markov", "realtime"]
    assert (config.fine_rank.model.type, config.fine_rank.model.dim) == ("deepfm", 3)


def test_an_overlay_that_extends_base_does_not_undo_what_lies_below_it(tmp_path: Path) -> None:
    first = file(tmp_path, "extends: base.yaml\nseed: 7\n" + MINIMAL)
    second = file(tmp_path, "extends: base.yaml\nname: second\n", "second.yaml")
    config = load([first, second])
    assert (config.name, config.seed) == ("second", 7)


def test_extends_is_relative_to_its_file_and_finds_the_shipped_base_from_anywhere(tmp_path: Path) -> None:
    file(tmp_path, MINIMAL, "parent.yaml")
    assert load([file(tmp_path / "deep", "extends: ../parent.yaml\nseed: 3\n")]).seed == 3
    for base in ("base.yaml", "configs/base.yaml"):
        assert load([file(tmp_path, f"extends: {base}\nseed: 4\n" + MINIMAL)]).seed == 4


def test_a_circle_of_extends_is_named(tmp_path: Path) -> None:
    file(tmp_path, "extends: b.yaml\n", "a.yaml")
    b = file(tmp_path, "name: b\nextends: a.yaml\n", "b.yaml")
    assert faults(b) == ["a.yaml:1: extends goes in a circle: b.yaml -> a.yaml -> b.yaml. Remove one of these lines."]


def test_a_file_that_is_not_there_is_a_fault_where_it_is_named(tmp_path: Path) -> None:
    file(tmp_path, MINIMAL, "parent.yaml")
    child = file(tmp_path, "name: x\nextends: parnet.yaml\n")
    assert faults(child) == ["mine.yaml:2: there is no file 'parnet.yaml'. Did you mean 'parent.yaml'?"]


def test_a_list_replaces_and_a_number_steps_into_it(tmp_path: Path) -> None:
    text = MINIMAL + "evaluate: {ks: [5, 10]}\nrerank: {caps: [{column: item_id}, {column: item_id, window: 5}]}\n"
    config = load([file(tmp_path, text)], ["evaluate.ks=[1]", "rerank.caps.1.window=7"])
    assert config.evaluate.ks == (1,)
    assert [cap.window for cap in config.rerank.caps] == [10, 7]


def test_another_type_replaces_the_section_and_the_same_type_merges(tmp_path: Path) -> None:
    path = file(tmp_path, MINIMAL + "fine_rank: {model: {type: deepfm, dim: 8}}\n")
    assert load([path], ["fine_rank.model.type=lr"]).fine_rank.model.type == "lr"
    model = load([path], ["fine_rank.model.dropout=0.5"]).fine_rank.model
    assert (model.type, model.dim, model.dropout) == ("deepfm", 8, 0.5)


def test_a_channel_is_named_by_its_type_and_null_takes_it_away(tmp_path: Path) -> None:
    path = file(tmp_path, "extends: base.yaml\n" + MINIMAL + "recall: {channels: {popular: null, near: {type: item_cf, neighbors: 3}}}\n")
    channels = load([path], ["recall.channels.item_cf={neighbors: 7}"]).recall.channels
    assert list(channels) == ["two_tower", "item_cf", "markov", "realtime", "near"]
    assert (channels["item_cf"].neighbors, channels["near"].neighbors) == (7, 3)


def test_history_is_a_short_name(tmp_path: Path) -> None:
    path = file(tmp_path, MINIMAL + "history: {events: [like], length: 9}\n")
    config = load([path], ["history.length=8"])
    assert (config.history.events, config.history.length) == (("like",), 8)
    assert faults(path, "history.lenght=8") == [
        "--set history.lenght=8: features.history.lenght is not a known key. Did you mean 'length'?"
    ]


# Values.


def test_scalars_follow_yaml_1_2(tmp_path: Path) -> None:
    tree = Reader().read([file(tmp_path, "a: no\nb: on\nc: 2022-05-04\nd: 1e-3\ne: 007\nf: 12:30\ng: true\nh:\ni: 0x1F\n5: x\n")])
    assert tree.plain() == {
        "a": "no", "b": "on", "c": "2022-05-04", "d": 0.001, "e": "007", "f": "12:30", "g": True, "h": None, "i": "0x1F", "5": "x",
    }  # fmt: skip


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    tree = Reader().read([file(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")])
    assert tree.plain()["b"] == {"x": 1, "y": 3}


def test_passwords_come_from_the_environment_and_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "hunter2")
    path = file(tmp_path, MINIMAL + "redis_url: redis://user:${STORE_PASSWORD}@${STORE_HOST:-db}:6379/0\n")
    config = load([path])
    assert config.redis_url == "redis://user:hunter2@db:6379/0"
    shown = (repr(config), document(config), json.dumps(config.document()), config.model_dump_json())
    for text in shown:
        assert "hunter2" not in text
    assert "redis://user:***@db:6379/0" in shown[1]
    monkeypatch.delenv("STORE_PASSWORD")
    assert faults(path) == ["mine.yaml:2: redis_url needs the environment variable STORE_PASSWORD, which is not set."]
    wrong = faults(path, "redis_url=[redis://u:hunter2@h]", "rediss_url=redis://u:hunter2@h")
    assert len(wrong) == 2
    assert "hunter2" not in "".join(wrong)


KAFKA = """\
ingest:
  log:
    type: kafka
    servers: h:9092
    options: {sasl.username: me, sasl.password: "${KAFKA_PASSWORD}", ssl.key.pem: "-----BEGIN hunter3", proxy.url: "http://u:hunter4@p"}
"""


def test_options_that_are_secret_by_their_names_reach_the_client_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", "hunter2")
    path = file(tmp_path, MINIMAL + KAFKA)
    config = load([path])
    log = config.ingest.log
    assert isinstance(log, KafkaLogConfig)
    assert log.options["sasl.password"] == "hunter2"
    kept = config.document()["ingest"]["log"]["options"]
    assert kept == {"sasl.username": "me", "sasl.password": "***", "ssl.key.pem": "***", "proxy.url": "http://u:***@p"}
    loaded = read([path], ["ingest.log.options={sasl.password: hunter5}"])
    assert loaded.config is not None
    origins = {dotted: str(origin) for dotted, origin in loaded.tree.leaves()}
    printed = (
        document(config),
        document(loaded.config, comments=False, origins=origins),
        config.model_dump_json(),
        repr(config),
        str(config),
    )
    for text in (*printed, json.dumps(config.document())):
        assert "hunter" not in text
    assert "sasl.username: me, sasl.password: '***'" in printed[0]
    assert origins["ingest.log.options.sasl.password"] == "--set ingest.log.options=***"


@pytest.mark.parametrize(
    "setting",
    [
        "ingest.log.options={sasl.password: 4711}",
        "ingest.log={type: kafka, servers: h, options: {sasl.password: 4711}}",
        "ingest.log=[{options: {sasl.password: '4711'}}]",
        "ingest.log.options.sasl.password",
    ],
)
def test_a_fault_in_secret_options_does_not_tell_them(tmp_path: Path, setting: str) -> None:
    found = faults(file(tmp_path, MINIMAL + "ingest: {log: {type: kafka, servers: h}}\n"), setting)
    assert found
    assert "4711" not in "".join(found)
    assert "--set ingest.log" in found[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:pw@h:1/0", "redis://:***@h:1/0"),
        ("failed at s3://key:se+cr/et@bucket, retrying", "failed at s3://key:***@bucket, retrying"),
        ('{"a":"redis://u:p@ss@h","b":"x@y"}', '{"a":"redis://u:***@h","b":"x@y"}'),
        ("ready at http://host:8000/ for x@y", "ready at http://host:8000/ for x@y"),
        ("rediss://:${PASSWORD}@h", "rediss://:${PASSWORD}@h"),
        ("redis://h/0?password=pw&db=1", "redis://h/0?password=***&db=1"),
        ('{"a":"unix:///s?db=1&password=p@w","b":1}', '{"a":"unix:///s?db=1&password=***","b":1}'),
        ("redis://h?password=${PASSWORD}", "redis://h?password=${PASSWORD}"),
    ],
)
def test_redact_hides_the_password_of_a_url_and_nothing_else(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_the_document_of_a_bundle_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    text = MINIMAL.replace("log.csv}", "log.csv}, items: {path: i.csv, columns: {price: {kind: number, scale: log}, tag: id}}")
    config = load([file(tmp_path, "extends: base.yaml\n" + text + "fine_rank: {model: {type: lr}}\nrerank: {lambda: 0.5}\n")])
    assert Config.model_validate(json.loads(json.dumps(config.document()))).model_dump() == config.model_dump()
    assert written(Config.model_validate({"data": {"interactions": {"path": "x"}}})) == {"data": {"interactions": {"path": "x"}}}


def test_what_show_prints_is_a_configuration(tmp_path: Path) -> None:
    config = load([file(tmp_path, MINIMAL + "fine_rank: {model: {type: lr}}\n")])
    for comments in (False, True):
        assert load([file(tmp_path, document(config, comments=comments), "shown.yaml")]) == config


def test_paths_of_state_and_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load([file(tmp_path / "configs", MINIMAL + "name: x\n")])
    assert config.root == f"{tmp_path}/.rayfunnel/x"
    assert config.place("runs") == f"{tmp_path}/.rayfunnel/x/runs"
    assert config.base == tmp_path / "configs"
    remote = load([tmp_path / "configs" / "mine.yaml"], ["workdir=s3://bucket/x/", "registry=/mnt/registry"])
    assert (remote.place("runs"), remote.place("registry")) == ("s3://bucket/x/runs", "/mnt/registry")
    elsewhere = load([tmp_path / "configs" / "mine.yaml"], ["data.interactions={path: other.csv}"])
    assert elsewhere.base == tmp_path  # written on the command line: from where one stands


def test_the_places_are_read_without_looking_at_anything_else(tmp_path: Path) -> None:
    path = file(tmp_path, "extends: base.yaml\nname: x\nworkdir: /w\nredis_url: ${NOT_SET_ANYWHERE}\nfine_rank: 3\n")
    places = read_as(OnlyPlaces, [path], ["name=y"]).config
    assert places is not None
    assert (places.name, places.place("registry")) == ("y", "/w/registry")
    wrong = read_as(OnlyPlaces, [path], ["name=a b", "workdir=3"])
    assert [fault.path for fault in wrong.faults] == ["name", "workdir"]


def test_a_fetched_data_set_is_found_by_its_placeholder(tmp_path: Path) -> None:
    path = file(tmp_path, 'fetch: ml-100k\ndata: {interactions: {path: "{data}/u.data"}}\n')
    config = load([path], [f"workdir={tmp_path}/w"])
    assert config.data.interactions.path == f"{tmp_path}/w/data/ml-100k/u.data"
    assert config.fetched == tmp_path / "w" / "data" / "ml-100k"


# Faults.


def test_all_faults_are_reported_together_with_line_value_and_nearest_name(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        """\
name: "with space"
data:
  interactions: {path: log.csv, usr: uid}
splt: {by: time}
fine_rank:
  model: {type: deepfmm}
  keep: -3
serve:
  data_plane: hapoxy
  port: eighty
learning_rate: 0.1
recall:
  channels:
    item_cf: {neighbours: 20}
    own: {neighbors: 20}
""",
    )
    assert faults(path, "two_tower.model.dims=8") == [
        "--set two_tower.model.dims=8: two_tower.model.dims is not a known key. Did you mean 'dim'?",
        """mine.yaml:1: name must match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$' (got "with space").""",
        "mine.yaml:3: data.interactions.usr is not a known key. Did you mean 'user'?",
        "mine.yaml:4: splt is not a known key. Did you mean 'split'?",
        """mine.yaml:6: fine_rank.model.type must be one of deepfm, lr (got "deepfmm"). Did you mean 'deepfm'?""",
        "mine.yaml:7: fine_rank.keep must be greater than 0 (got -3).",
        """mine.yaml:9: serve.data_plane must be 'python' or 'haproxy' (got "hapoxy"). Did you mean 'haproxy'?""",
        """mine.yaml:10: serve.port must be a valid integer (got "eighty").""",
        "mine.yaml:11: learning_rate is not a known key. Did you mean 'two_tower.training.learning_rate'?",
        "mine.yaml:14: recall.channels.item_cf.neighbours is not a known key. Did you mean 'neighbors'?",
        f"mine.yaml:15: recall.channels.own.type is missing; one of {', '.join(CHANNELS)}.",
    ]
    with pytest.raises(ConfigError) as raised:
        load([path])
    assert len(raised.value.faults) == 10


def test_the_line_is_that_of_the_file_that_wrote_the_value_last(tmp_path: Path) -> None:
    file(tmp_path, MINIMAL + "fine_rank:\n  keep: 0\ncoarse_rank: {keep: 0}\n", "parent.yaml")
    child = file(tmp_path, "extends: parent.yaml\nname: x\nfine_rank:\n  keep: -1\n")
    assert faults(child) == [
        "mine.yaml:4: fine_rank.keep must be greater than 0 (got -1).",
        "parent.yaml:4: coarse_rank.keep must be greater than 0 (got 0).",
    ]


def test_sections_that_do_not_fit_together_are_faults_too(tmp_path: Path) -> None:
    text = "data:\n  interactions: {path: log.csv}\n  items: {path: i.csv, columns: {category: id}}\n"
    path = file(
        tmp_path,
        text + "coarse_rank: {keep: 50}\nfine_rank:\n  keep: 60\n  features: [user_id, categry]\n"
        "recall: {merge: {limit: 40, weights: {itemcf: 2}}}\nrerank: {caps: [{column: brand}]}\n",
    )
    assert sorted(faults(path)) == [
        "mine.yaml:4: coarse_rank.keep is 50, more than the 40 that recall.merge.limit lets through.",
        "mine.yaml:6: fine_rank.keep is 60, more than the 50 that coarse_rank.keep lets through.",
        "mine.yaml:7: fine_rank.features uses feature 'categry', which no column declares; did you mean 'category'?",
        "mine.yaml:8: recall.merge.weights.itemcf names no channel; channels are two_tower, item_cf, markov, realtime, popular.",
        "mine.yaml:9: rerank.caps.0.column names 'brand', which no item column declares; known: category.",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1, 2\nb: 3\n", "mine.yaml:2: is not valid YAML: "),
        ("a: 1\n\tb: 2\n", "mine.yaml:2: is not valid YAML: "),
        ("- a\n- b\n", 'mine.yaml:1: must hold keys and values, such as `name: mine` (got ["a", "b"]).'),
        ("a: !!python/object:os.system {}\n", "mine.yaml:1: is not valid YAML: the tag '"),
        ("a: &a [*a]\n", "mine.yaml:1: is not valid YAML: an alias that contains itself"),
        ("[a, b]: 1\n", "mine.yaml:1: is not valid YAML: a key must be a plain word"),
    ],
)
def test_text_that_is_no_yaml_is_a_fault_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    assert faults(file(tmp_path, text))[0].startswith(sentence)


def test_bytes_that_are_no_text_are_a_fault(tmp_path: Path) -> None:
    path = file(tmp_path, "")
    path.write_bytes(b"name: \xff\xfe\n")
    assert faults(path)[0].startswith("mine.yaml: cannot be read as UTF-8 text")


def test_a_key_set_twice_is_a_fault_beside_the_others(tmp_path: Path) -> None:
    assert faults(file(tmp_path, MINIMAL + "seed: 1\nsplit: {by: tim}\nseed: 2\n")) == [
        "mine.yaml:4: seed is set twice in one section, first on line 2. Remove one.",
        """mine.yaml:3: split.by must be 'time', 'random', 'leave_one_out' or 'parts' (got "tim"). Did you mean 'time'?""",
    ]


def test_a_setting_without_a_path_is_a_fault(tmp_path: Path) -> None:
    path = file(tmp_path, MINIMAL)
    for setting in ("epochs", "=3", "a..b=3"):
        assert faults(path, setting) == [f"--set {setting}: must read path=value, for example --set fine_rank.training.epochs=3."]
    assert faults(path, "seed=[1")[0].startswith("--set seed=[1:1: is not valid YAML")


def test_an_empty_file_lacks_the_data(tmp_path: Path) -> None:
    assert faults(file(tmp_path, "")) == ["mine.yaml:1: data is missing; it has no default."]


def test_null_is_shown_as_null(tmp_path: Path) -> None:
    assert faults(file(tmp_path, MINIMAL + "seed: null\n")) == ["mine.yaml:2: seed must be a valid integer (got null)."]
