"""The environment that Ray starts in: explicit, private to one service, and set before Ray is imported."""

import logging
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cluster import runtime
from cluster.runtime import inside_job, refuse_relative_workdir, serving_environment
from recsys.errors import ConfigError, RayfunnelError
from recsys.serve_config import ServeConfig

ROOT = Path(__file__).parents[2]


def test_the_data_plane_is_one_switch_and_says_both_of_its_flags_either_way() -> None:
    flags = ("RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_ENABLE_HA_PROXY")
    fast, plain = (serving_environment(ServeConfig(data_plane=plane)) for plane in ("haproxy", "python"))
    assert [fast[flag] for flag in flags] == ["1", "1"]
    assert [plain[flag] for flag in flags] == ["0", "0"]  # said, so that what the shell holds does not count
    assert not any("HAPROXY" in name for name in plain)


def test_two_services_on_one_host_share_no_port_and_no_file_of_haproxy() -> None:
    one, two = (serving_environment(ServeConfig(port=port)) for port in (18_111, 18_112))
    shared = [name for name in one if "HAPROXY" in name and one[name] == two[name]]
    assert sorted(shared) == ["RAY_SERVE_HAPROXY_METRICS_ENABLED", "RAY_SERVE_HAPROXY_NBTHREAD", "RAY_SERVE_HAPROXY_RETRY_ON"]
    assert one["RAY_SERVE_HAPROXY_STATS_PORT"] != one["RAY_SERVE_HAPROXY_METRICS_PORT"]
    # Ray's default is one port for all clusters of a host: while a service starts, another would answer in its name.
    fallback = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
    assert one.get(fallback, "8500") != two.get(fallback, "8500")
    folder = Path(one["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        # Ray puts a folder of 56 letters per node between the folder and the socket; HAProxy takes 97 characters.
        assert len(f"{folder}/{'x' * 56}/metrics.sock") <= 97
    finally:
        folder.rmdir()
        Path(two["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"]).rmdir()


def test_a_folder_of_somebody_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(f"/tmp/rf-{os.getuid()}-18113")
    folder.symlink_to("/tmp")
    try:
        with pytest.raises(RayfunnelError, match=r"rf-\d+-18113' belongs to somebody else. Remove it, or serve on another port."):
            serving_environment(ServeConfig(port=18_113))
    finally:
        folder.unlink()


def test_configured_ports_and_threads_are_taken() -> None:
    serve = ServeConfig.model_validate(
        {"port": 18_114, "haproxy": {"stats_port": 18_404, "metrics_port": 18_405, "threads": 3}, "drain_s": 7}
    )
    env = serving_environment(serve)
    Path(env["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"]).rmdir()
    assert (env["RAY_SERVE_HAPROXY_STATS_PORT"], env["RAY_SERVE_HAPROXY_METRICS_PORT"]) == ("18404", "18405")
    assert env["RAY_SERVE_HAPROXY_NBTHREAD"] == "3"
    assert env["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == "7"


def test_only_a_submitted_job_refuses_relative_workdirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(runtime.JOB_MARK, raising=False)
    assert not inside_job()
    refuse_relative_workdir(None)
    refuse_relative_workdir("state")
    monkeypatch.setenv(runtime.JOB_MARK, '{"runtime_env": {}}')
    assert inside_job()
    refuse_relative_workdir("/data/state")
    refuse_relative_workdir("s3://bucket/state")
    with pytest.raises(ConfigError, match=r"workdir is 'state', a relative path, .* --set workdir=/data/rayfunnel"):
        refuse_relative_workdir("state")


def test_late_flags_are_warned_of_and_the_users_security_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED", "RAY_SERVE_DEMO", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.setenv(name, "disabled")
    monkeypatch.setitem(sys.modules, "ray.serve", sys)
    with caplog.at_level(logging.WARNING):
        runtime._set_environment({"RAY_SERVE_DEMO": "1"})
    assert "ray.serve was imported before these were set, so this process keeps their old values: RAY_SERVE_DEMO" in caplog.text
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_a_local_cluster_is_locked_with_a_token_unless_the_user_says_otherwise() -> None:
    code = """
        import os, sys
        os.environ.pop("RAY_AUTH_MODE", None)
        from cluster.runtime import _set_environment
        _set_environment({})
        assert "ray" not in sys.modules
        sys.stdout.write(os.environ["RAY_AUTH_MODE"] + os.environ["RAY_USAGE_STATS_ENABLED"])
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    assert done.stdout == "token0"


def test_a_cluster_that_does_not_answer_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        RayfunnelError, match=r"No Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 \(.*refused\). Start it, correct the address"
    ):
        runtime.start_ray()


def test_a_ray_that_does_not_come_up_in_time_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(runtime, "_set_environment", lambda _: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(RayfunnelError, match=r"Could not reach a local Ray cluster: The current node timed out .* give the command again"):
        runtime.start_ray()
