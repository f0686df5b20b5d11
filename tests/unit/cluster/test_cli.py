"""The command line: help, exit codes, and messages that name the way out."""

import json
import sys

import pytest
import yaml
from typer.testing import CliRunner

from cluster import cli
from cluster.errors import (
    ConfigError,
    NoClusterError,
    PortInUseError,
    RequestError,
    TrainingError,
)


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch, tmp_path):
    for name in ("PACELINE_CONFIG", "PACELINE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PACELINE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def paceline(monkeypatch, capsys):
    """Runs the command as a shell would; gives exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paceline", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return run


COMMANDS = ["serve", "status", "chat", "kv", "doctor", "fetch", "train", "draft", "render"]


def test_help_lists_every_command():
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert all(f" {command} " in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, "train student", "train draft", "draft refresh"])
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(cli.app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


@pytest.mark.parametrize("command", ["serve", "doctor", "fetch", "render", "kv", "train student"])
def test_a_typo_in_a_config_names_the_field_and_ends_the_command(paceline, tmp_path, command):
    path = tmp_path / "c.yaml"
    path.write_text("engine:\n  speculation: {num_draft_tokns: 4}\n")
    code, _, said = paceline(*command.split(), "--config", str(path))
    assert code == ConfigError.exit_code
    assert "c.yaml:2: engine.speculation.num_draft_tokns: unknown field" in said
    assert "did you mean num_draft_tokens?" in said
    assert "Traceback" not in said


def test_serve_without_weights_names_the_command_that_fetches_them(paceline):
    code, _, said = paceline("serve")
    assert code == cli.WEIGHTS_MISSING_EXIT_CODE
    assert "paceline fetch" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("arguments", [["status"], ["chat", "hi"], ["kv"]])
def test_commands_that_need_a_cluster_say_how_to_start_one(paceline, arguments):
    code, _, said = paceline(*arguments)
    assert code == NoClusterError.exit_code
    assert "paceline serve" in said


def test_chat_with_a_server_that_is_not_there_is_one_line(paceline):
    code, _, said = paceline("chat", "hi", "--url", "http://127.0.0.1:1")
    assert code == RequestError.exit_code
    assert "127.0.0.1:1" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://[::1"], "--url: "),
        (["--url", "http://127.0.0.1:1", "--api-key", "schlüssel"], "--api-key: "),
        (["--url", "http://127.0.0.1:1", "--api-key", "a\nschlüssel"], "--api-key: "),
    ],
)
def test_an_address_or_key_that_cannot_be_is_one_line(paceline, arguments, said):
    code, _, error = paceline("chat", "hi", *arguments)
    assert code == ConfigError.exit_code
    assert said in error
    assert "schlüssel" not in error
    assert "Traceback" not in error


def test_the_report_of_a_load_test_can_be_written_before_it_begins(paceline, tmp_path):
    (tmp_path / "file").touch()
    for option in ("--out", "--requests"):
        # Nobody is asked: there is no server.
        path = tmp_path / "file" / "report.json"
        arguments = ["--url", "http://127.0.0.1:1", "--out", str(tmp_path / "r.json")]
        code, _, error = paceline("bench", "serve", *arguments, option, str(path))
        assert code == ConfigError.exit_code
        assert f"{option}: {path}: " in error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds no settings"),
        (json.dumps({"hidden_act": "gelu"}), "gelu"),
    ],
)
def test_a_model_that_no_student_can_be_made_of_is_one_line(paceline, tmp_path, content, said):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(content)
    path = tmp_path / "c.yaml"
    path.write_text(f"engine: {{model: {model}}}\n")
    code, _, error = paceline("train", "student", "--config", str(path))
    assert code == ConfigError.exit_code
    assert "engine.model: " in error
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--speed", "2"], "--speed: only with --trace"),
        (["--scale", "1", "--seconds", "5"], "--scale, --seconds: only with --trace"),
        (["--trace", "t.csv", "--rate", "1:1"], "--rate: not with --trace"),
        (["--trace", "t.csv", "--max-tokens", "9"], "--max-tokens: not with --trace"),
        (["--prompt-tokens", "9", "--trace", "t.csv"], "give one of them"),
    ],
)
def test_load_options_that_would_do_nothing_are_refused(paceline, arguments, said):
    code, _, error = paceline("bench", "serve", *arguments)
    assert code == ConfigError.exit_code
    assert said in error


def test_render_prints_a_serve_config(paceline, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("app_name: mine\nengine: {num_pages: 32}\n")
    code, printed, _ = paceline("render", "--config", str(path))
    assert code == 0
    [application] = yaml.safe_load(printed)["applications"]
    assert application["name"] == "mine"
    assert application["args"]["engine"] == {"kind": "torch", "num_pages": 32}


def test_render_prints_the_schema(paceline):
    code, printed, _ = paceline("render", "--schema")
    assert code == 0
    assert json.loads(printed)["additionalProperties"] is False


def test_kv_of_a_config_measures_its_folder(paceline, tmp_path):
    segments = tmp_path / "ssd" / "replica-0"
    segments.mkdir(parents=True)
    (segments / "segment-0.log").write_bytes(b"x" * 8192)
    path = tmp_path / "c.yaml"
    path.write_text(f"kv: {{tiers: [{{kind: ssd, root: {tmp_path / 'ssd'}}}]}}\n")
    code, printed, _ = paceline("kv", "--config", str(path), "--json")
    assert code == 0
    [usage] = json.loads(printed)
    assert usage["num_replicas"] == 1
    assert usage["num_bytes"] >= 8192


def test_every_error_of_the_package_has_an_exit_code_of_its_own():
    errors = [ConfigError, PortInUseError, NoClusterError, RequestError, TrainingError]
    codes = [error.exit_code for error in errors] + [cli.WEIGHTS_MISSING_EXIT_CODE]
    assert len(set(codes)) == len(codes)
    assert all(code > 1 for code in codes)


def test_fetch_brings_the_draft_model_of_a_config_too(paceline, tmp_path):
    for name in ("target", "small"):
        (tmp_path / name).mkdir()
    path = tmp_path / "c.yaml"
    path.write_text(
        f"engine: {{model: {tmp_path / 'target'}}}\n"
        f"draft: {{drafter: 'model:{tmp_path / 'small'}'}}\n"
    )
    code, printed, _ = paceline("fetch", "--config", str(path))
    assert code == 0
    assert [line.rpartition("/")[2] for line in printed.splitlines()] == ["target", "small"]
