"""The docs name only what exists, and everything they must name."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.module_index import INDEX_PATH, module_index
from tests.reference import REFERENCE_PATH, reference, settings

LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?!https?://|mailto:)([^)#\s]*)(#[^)\s]+)?\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PACKAGES = ("cluster", "deployments", "kv_store", "protos", "tests")


def _tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", *patterns], check=True, capture_output=True, text=True
    )
    return [path for name in listing.stdout.split("\0") if name and (path := Path(name)).is_file()]


PAGES = _tracked("*.md")
EXAMPLES = [path for path in _tracked("docs/examples") if path.suffix in {".py", ".yaml", ".sh"}]


def _prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def _anchors(path: Path) -> set[str]:
    headings = HEADING.findall(_prose(path))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_the_pages_are_there() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"} <= {
        str(page) for page in PAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target, anchor in LINK.findall(_prose(page)):
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor[1:] not in _anchors(file)):
            dead.append(target + anchor)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_code_names_exist(page: Path) -> None:
    missing = []
    for code in CODE.findall(_prose(page)):
        if re.fullmatch(rf"(?:{'|'.join(PACKAGES)}|k8s|docs)(?:/[\w.-]+)+/?", code):
            if not Path(code).exists():
                missing.append(code)
        elif re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+(?::\w+)?", code) and not _resolves(
            code.replace(":", ".")
        ):
            missing.append(code)
    assert missing == []


def _resolves(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    module = name
    rest: list[str] = []
    while module:
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
            continue
        for part in rest:
            fields = getattr(found, "model_fields", {})
            if part not in fields and not hasattr(found, part):
                return False
            found = getattr(found, part, None)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_make_targets_exist(page: Path) -> None:
    makefile = Path("Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^|&& )make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert named <= targets


def test_commands_exist() -> None:
    import typer.main

    from cluster.cli import app

    named = {
        command
        for page in PAGES
        for command in re.findall(
            r"(?:`|^)paceline ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert "serve" in named
    assert named <= set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_the_reference_is_up_to_date() -> None:
    assert REFERENCE_PATH.read_text(encoding="utf-8") == reference()


def test_the_module_index_is_up_to_date() -> None:
    assert INDEX_PATH.read_text(encoding="utf-8") == module_index()


def test_every_setting_is_explained() -> None:
    assert [item.path for item in settings() if not item.description] == []


def test_every_error_is_explained() -> None:
    from deployments.errors import ERROR_TABLE

    assert [error.__name__ for error in ERROR_TABLE if not error.__doc__] == []


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_example_is_run_by_a_test(example: Path) -> None:
    """A test names the file, or the folder whose files it takes all."""
    tests = [path.read_text(encoding="utf-8") for path in _tracked("tests/*.py")]
    names = (str(example), f'{example.parent}"', f"{example.stem}.py")
    assert any(name in text for text in tests for name in names)


def test_adrs_are_numbered_and_listed() -> None:
    folder = Path("docs/adr")
    records = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
    assert [path.name[:4] for path in records] == [
        f"{number:04}" for number in range(1, len(records) + 1)
    ]
    index = (folder / "README.md").read_text(encoding="utf-8")
    for record in records:
        text = record.read_text(encoding="utf-8")
        assert record.name in index
        for heading in ("Context", "Decision", "Consequences", "What would change our mind"):
            assert f"## {heading}" in text, (record, heading)
