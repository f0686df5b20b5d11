"""What is looked for before a start, so that nothing fails minutes later."""

import pytest

from cluster import preparation
from cluster.checks import Verdict, _drafter
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from deployments.engine.errors import WeightsMissingError


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path):
    """A config whose target is here."""
    folder = tmp_path / "target"
    folder.mkdir()

    def make(drafter: str, **settings: object) -> ClusterConfig:
        return ClusterConfig.model_validate(
            {"cache_dir": tmp_path, "engine": {"model": str(folder)}, "draft": {"drafter": drafter}}
            | settings
        )

    return make


def test_a_draft_model_that_is_not_here_is_named(config):
    wanted = config("model:/nowhere/at-all")
    with pytest.raises(WeightsMissingError, match="/nowhere/at-all"):
        preparation.check_prepared(wanted)
    [finding] = _drafter(wanted)
    assert (finding.verdict, finding.hint) == (Verdict.FAILED, "paceline fetch")


def test_a_draft_model_that_is_here_is_found(config, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    wanted = config(f"model:{folder}")
    preparation.check_prepared(wanted)
    [finding] = _drafter(wanted)
    assert (finding.verdict, finding.detail) == (Verdict.OK, str(folder))


@pytest.mark.parametrize(
    ("drafter", "problem"),
    [
        ("no.such:thing", "No module named 'no'"),
        ("mine:Missing", "has no attribute 'Missing'"),
        ("mine:NUMBER", "is not a class or a function"),
        ("raising:Drafter", "ValueError('not today')"),
        ("model:", 'is neither "suffix" nor "module:name"'),
        ("studnt", 'is neither "suffix" nor "module:name"'),
    ],
)
def test_a_drafter_that_cannot_be_imported_is_refused(config, tmp_path, drafter, problem):
    (tmp_path / "mine.py").write_text("NUMBER = 1\n")
    (tmp_path / "raising.py").write_text("raise ValueError('not today')\n")
    wanted = config(drafter)
    with pytest.raises(ConfigError, match=r"draft\.drafter: ") as refused:
        preparation.check_prepared(wanted)
    assert problem in str(refused.value)
    [finding] = _drafter(wanted)
    assert finding.verdict is Verdict.FAILED


def test_a_drafter_in_the_current_folder_is_found_as_a_replica_finds_it(config, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine: ...\n")
    assert preparation.find_drafter(config("mine:Mine")) == "mine:Mine"


@pytest.mark.parametrize(
    "without", [{"pools": {"draft": None}}, {"engine": {"speculation": {"enabled": False}}}]
)
def test_without_a_draft_pool_no_drafter_is_looked_for(config, without):
    wanted = config("model:/nowhere/at-all", **without)
    assert preparation.find_drafter(wanted) is None
    assert list(_drafter(wanted)) == []
    assert preparation.config_models(wanted) == (wanted.engine.model,)


def test_preparing_fetches_the_draft_model_too(config, tmp_path, monkeypatch):
    folder = tmp_path / "small"
    folder.mkdir()
    asked = []
    monkeypatch.setattr(preparation, "fetch_weights", lambda model, *_: asked.append(model))
    wanted = config(f"model:{folder}")
    preparation.prepare(wanted, lambda message: None)
    assert asked == [wanted.engine.model, str(folder)]
