"""The offline command line: quick to start, exact in what it passes on, and a sentence instead of a traceback."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cluster
from cluster.cli import app
from cluster.registry import Registry
from cluster.runtime import JOB_MARK
from recsys.errors import DataError, TrainingError

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "init", "data fetch", "data validate", "data describe", "prepare", "train", "tune", "evaluate", "recommend", "features describe",
    "publish", "promote", "rollback", "versions", "config check", "config show", "retrain", "impressions", "skew",
    "ingest status", "ingest dead-letters", "items upsert", "items delete", "users upsert", "users delete", "rules show", "rules set", "rules clear",
)  # fmt: skip
runner = CliRunner()


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYFUNNEL_DEBUG", raising=False)
    monkeypatch.delenv(JOB_MARK, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A sound configuration whose state lies in tmp_path."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nworkdir: {tmp_path}/work\ndata: {{interactions: {{path: log.csv, time: ts}}}}\n")
    (tmp_path / "log.csv").write_text("user_id,item_id,ts\n" + "".join(f"u{n % 3},i{n % 5},{n}\n" for n in range(30)))
    return path


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for what the commands call (cluster.pipeline, steps, evaluation, search), and notes what they are asked."""
    asked: dict[str, Any] = {}

    def noting(name: str, answer: Any = None):
        def call(config: Any, *arguments: Any, **named: Any) -> Any:
            asked[name] = (config.name, [a for a in arguments if type(a).__name__ != "Console"], named)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call

    module = types.ModuleType("cluster.pipeline")
    module.recommend = noting("recommend")  # type: ignore[attr-defined]
    for name, function in (("steps", "prepare"), ("evaluation", "evaluate"), ("search", "search_config")):
        other = types.ModuleType(f"cluster.{name}")
        setattr(other, function, noting(function))
        monkeypatch.setitem(sys.modules, f"cluster.{name}", other)
        monkeypatch.setattr(cluster, name, other, raising=False)
    module.train, module.publish = noting("train", "v000001-0a1b2c3d"), noting("publish", "v000002-0a1b2c3d")  # type: ignore[attr-defined]
    module.fails = noting  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cluster.pipeline", module)
    monkeypatch.setattr(cluster, "pipeline", module, raising=False)
    asked["module"] = module
    return asked


def run(*arguments: Any) -> Any:
    """The result of a command; `stdout` and `stderr` without line breaks of the terminal."""
    return runner.invoke(app, [str(a) for a in arguments], catch_exceptions=True)


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_help_starts_without_torch_ray_pandas_and_pyarrow() -> None:
    code = """
import sys
sys.argv = ["cluster", "--help"]
try:
    import cluster.__main__
    cluster.__main__.main()
finally:
    heavy = {"torch", "ray", "pandas", "pyarrow", "faiss", "numpy", "pydantic"} & set(sys.modules)
    sys.stderr.write("HEAVY:" + ",".join(sorted(heavy)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "A first tour" in done.stdout
    assert done.stderr.endswith("HEAVY:")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_itself(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    if command != "init":  # it writes the configuration
        assert "--config" in result.stdout
        assert "--set" in result.stdout
    assert f"rayfunnel {command}" in flat(result.stdout), "an example"


def test_every_command_is_listed_here() -> None:
    named = {(c.name or c.callback.__name__) for c in app.registered_commands}
    grouped = {f"{g.name} {c.name}" for g in app.registered_groups for c in g.typer_instance.registered_commands}
    assert (named | grouped) - {"serve", "quickstart"} == set(COMMANDS)  # those two are of deployments.cli, if it was imported


def test_commands_pass_on_what_they_are_told(config: Path, pipeline: dict[str, Any], tmp_path: Path) -> None:
    assert "Published v000001-0a1b2c3d" in run("train", "-c", config, "--set", "name=other").stdout
    assert pipeline["train"] == ("other", [], {})
    assert run("prepare", "--config", config).exit_code == 0
    assert run("evaluate", "-c", config, "--protocol", "top_n", "--models", "ease, popular", "--json", "r.json").exit_code == 0
    assert pipeline["evaluate"][2] == {"protocol": "top_n", "models": ["ease", "popular"], "json": Path("r.json"), "html": None}
    assert run("recommend", "-c", config, "196", "u/ü", "-k", "5", "--version", "3").exit_code == 0
    assert pipeline["recommend"][1:] == ([["196", "u/ü"]], {"k": 5, "version": "3", "only": None})
    assert run("recommend", "-c", config, "196", "--filter", '{"genres": "Comedy"}').exit_code == 0
    assert pipeline["recommend"][2]["only"] == '{"genres": "Comedy"}'
    assert run("tune", "-c", config, "--space", "space.yaml", "--trials", "4").exit_code == 0
    assert pipeline["search_config"][1:] == ([Path("space.yaml")], {"trials": 4, "write": None})
    published = run("publish", "-c", config, "-s", "registry=redis://:hunter2@my host").stdout
    assert published.endswith(f"Put it to work:\n  rayfunnel promote v000002-0a1b2c3d -c {config} --set 'registry=redis://:***@my host'\n")


def test_an_error_of_ours_is_one_sentence_and_exit_code_2(config: Path, pipeline: dict[str, Any]) -> None:
    pipeline["module"].train = pipeline["module"].fails("train", TrainingError("The loss is NaN [at step 3]. Lower learning_rate."))
    result = run("train", "-c", config)
    assert result.exit_code == 2
    assert result.stderr == "The loss is NaN [at step 3]. Lower learning_rate.\n"


def test_the_error_of_a_worker_comes_without_the_workers_traceback(config: Path, pipeline: dict[str, Any]) -> None:
    class WrappedError(DataError):
        """Like Ray's error of a task: it is one of ours, with a traceback as its text."""

        cause = DataError("'log.csv' has no column 'usr'. It has: user.")

    pipeline["module"].train = pipeline["module"].fails("train", WrappedError("ray::train() Traceback (most recent call last) ..."))
    assert run("train", "-c", config).stderr == "'log.csv' has no column 'usr'. It has: user.\n"


def test_debug_shows_the_traceback(config: Path, pipeline: dict[str, Any]) -> None:
    pipeline["module"].train = pipeline["module"].fails("train", TrainingError("The loss is NaN."))
    result = run("--debug", "train", "-c", config)
    assert isinstance(result.exception, TrainingError)
    assert run("train", "-c", config).exit_code == 2  # the next command of the same process does not inherit it


def test_a_bug_is_not_dressed_up(config: Path, pipeline: dict[str, Any]) -> None:
    pipeline["module"].train = pipeline["module"].fails("train", ZeroDivisionError("division by zero"))
    assert isinstance(run("train", "-c", config).exception, ZeroDivisionError)


def test_control_c_says_stopped(config: Path, pipeline: dict[str, Any]) -> None:
    pipeline["module"].train = pipeline["module"].fails("train", KeyboardInterrupt())
    result = run("train", "-c", config)
    assert (result.exit_code, result.stderr) == (130, "Stopped.\n")


def test_a_file_that_nobody_may_write_is_named(config: Path, pipeline: dict[str, Any]) -> None:
    pipeline["module"].train = pipeline["module"].fails("train", PermissionError(13, "Permission denied", "/work/data"))
    result = run("train", "-c", config)
    assert result.exit_code == 2
    assert result.stderr == "'/work/data' cannot be used: Permission denied. Check that it exists and who may read or write it.\n"


def test_wrong_usage_is_exit_code_2_with_a_hint(config: Path) -> None:
    result = run("trian", "-c", config)
    assert result.exit_code == 2
    assert "Did you mean 'train'" in flat(result.stderr)
    assert "--config" in run("train").stderr
    assert run("evaluate", "-c", config, "--protocol", "nxt").exit_code == 2


def test_a_submitted_job_refuses_a_relative_workdir(config: Path, pipeline: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_MARK, "{}")
    for value, shown in (("state", "'state'"), ("", "the default (./.rayfunnel/<name>)")):
        result = run("train", "-c", config, "--set", f"workdir={value}")
        assert result.exit_code == 2
        assert result.stderr.startswith(f"workdir is {shown}, a relative path, but this command runs inside a Ray job")
    assert "train" not in pipeline
    for value in ("/data/x", "s3://bucket/x"):
        assert run("train", "-c", config, "--set", f"workdir={value}").exit_code == 0


def test_check_names_all_faults_in_a_table_and_fails(config: Path) -> None:
    assert flat(run("config", "check", "-c", config).stdout).endswith("mine.yaml: no faults. ")
    result = run("config", "check", "-c", config, "--set", "seed=x", "--set", "fine_rank.modell=1")
    assert result.exit_code == 2
    text = flat(result.stderr)
    assert 'seed │ "x" │ must be a valid integer' in text
    assert "fine_rank.modell │ │ is not a known key │ model" in text
    assert "2 faults." in text


def test_faults_of_any_command_are_lines_on_stderr(config: Path) -> None:
    result = run("train", "-c", config, "--set", "seed=x", "--set", "nam=y")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "The configuration has 2 faults:",
        "- --set nam=y: nam is not a known key. Did you mean 'name'?",
        '- --set seed=x: seed must be a valid integer (got "x").',
    ]


def test_show_masks_passwords_and_tells_origins(config: Path) -> None:
    shown = run("config", "show", "-c", config, "--set", "redis_url=redis://:hunter2@db:6379", "--origins").stdout
    assert "hunter2" not in shown
    assert f"name: mine  # {config}:1\n" in shown
    assert "redis_url: redis://:***@db:6379  # --set redis_url=redis://:***@db:6379\n" in shown
    assert re.search(r"^seed: 1  # base.yaml:\d+$", shown, re.M)
    assert "# Of everything drawn at random" in run("config", "show", "-c", config, "--documented").stdout


def test_versions_promote_rollback_and_publish_a_folder(config: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "work" / "registry")
    none = run("versions", "-c", config).stdout
    assert "No version in" in none
    assert none.endswith(f"yet. Publish one:\n  rayfunnel train -c {config}\n")
    empty = run("promote", "-c", config)
    assert empty.exit_code == 2
    assert "It holds no version yet; 'rayfunnel train -c FILE' publishes one." in empty.stderr
    first = registry.publish(lambda at: (at / "x").write_text("1") and None, metrics={"ndcg@10": 0.125})
    published = run("publish", "-c", config, "--folder", registry.bundles / first)
    assert published.exit_code == 0
    second = registry.resolve("latest")
    assert run("promote", "-c", config, "1").stdout == f"{first} is production\n"
    assert run("promote", "-c", config).stdout == f"{second} is production\n"
    listed = run("versions", "-c", config).stdout
    assert re.search(rf"{second} +│ production .*0\.1250", listed)
    assert re.search(rf"{first} +│ previous", listed)
    assert run("rollback", "-c", config).stdout == f"{first} is production again\n"
    assert run("promote", "-c", config, "2", "--canary").stdout == f"{second} is canary\n"
    assert registry.aliases() == {"production": first, "previous": second, "canary": second}
    for more in (["2"], ["--canary"]):
        wrong = run("promote", "-c", config, "--drop-canary", *more)
        assert (wrong.exit_code, wrong.stderr) == (2, "--drop-canary promotes nothing: give it neither a version nor --canary.\n")
    assert run("promote", "-c", config, "--drop-canary").stdout == f"{second} is no longer canary\n"
    assert run("promote", "-c", config, "--drop-canary").stdout == "No version was canary\n"
    assert registry.aliases() == {"production": first, "previous": second}
    assert "requests are not split" in flat(run("promote", "--help").stdout)


def test_data_is_validated_and_described(config: Path) -> None:
    validated = run("data", "validate", "-c", config)
    assert validated.exit_code == 0, validated.stderr
    assert re.search(r"rows read +│ 30 ", validated.stdout)
    assert "train 24, valid 3, test 3" in flat(validated.stdout)
    described = run("data", "describe", "-c", config).stdout
    assert re.search(r"events +│ 30 ", described)
    assert "names no public data set" in flat(run("data", "fetch", "-c", config).stdout)


def test_python_m_cluster_is_the_same(config: Path) -> None:
    command = [sys.executable, "-m", "cluster", "config", "check", "-c", str(config), "--set", "sed=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "TERM": "dumb"})
    assert done.returncode == 2
    assert "did you mean" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.dumps(done.stdout) == '""'
