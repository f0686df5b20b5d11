"""Rules about the files themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MAX_MODULE_LINES = 400
MAX_FILE_BYTES = 2 << 20
DRAFTS = Path("deployments/engine/torch_engine/data/students")
MAX_DRAFT_BYTES = 48 << 20
PACKAGES = ("cluster", "deployments", "kv_store", "protos")
CONSTRAINTS = Path(".constraints/core.txt")

# Folders of somebody's machine. A path of the image (Dockerfile) or the chart is none of these.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|Users|home/(?!paceline\b)\w+)(?:/|\b)")
NOTE_TO_SELF = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b")


def _tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True)
    return [path for name in listing.stdout.split("\0") if name and (path := Path(name)).is_file()]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


TRACKED = _tracked()
MODULES = [
    path
    for path in TRACKED
    if path.suffix == ".py" and path.parts[0] in PACKAGES and "_pb2" not in path.name
]


def test_git_knows_the_files() -> None:
    assert {Path("pyproject.toml"), Path("cluster/__init__.py")} <= set(TRACKED)


def test_the_top_level_is_the_agreed_one() -> None:
    folders = {path.parts[0] for path in TRACKED if len(path.parts) > 1}
    visible = {name for name in folders if not name.startswith(".")}
    assert visible == {*PACKAGES, "docs", "k8s", "tests"}


def test_no_path_of_a_machine() -> None:
    found = [
        f"{path}: {match.group()}"
        for path in TRACKED
        if (text := _text(path)) is not None
        for match in MACHINE_PATH.finditer(text)
    ]
    assert found == []


def test_no_notes_to_self() -> None:
    found = [
        str(path)
        for path in TRACKED
        if path.suffix in {".py", ".md", ".yaml", ".tpl", ".proto"}
        and NOTE_TO_SELF.search(_text(path) or "")
    ]
    assert found == []


def test_no_large_file_but_drafts() -> None:
    large = [path for path in TRACKED if path.stat().st_size > MAX_FILE_BYTES]
    assert [str(path) for path in large if path.parent != DRAFTS] == []
    assert sum(path.stat().st_size for path in large) <= MAX_DRAFT_BYTES


def test_every_text_file_ends_with_one_newline() -> None:
    def ends_well(text: str) -> bool:
        return not text or (text.endswith("\n") and not text.endswith("\n\n"))

    # What generators write is compared with the generator byte for byte instead.
    own = [path for path in TRACKED if "_pb2" not in path.name and path.suffix != ".bin"]
    texts = {path: text for path in own if (text := _text(path)) is not None}
    assert [str(path) for path, text in texts.items() if not ends_well(text)] == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_is_small_and_says_what_it_is(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_MODULE_LINES
    assert ast.get_docstring(ast.parse(source))


def _bound_names(body: list[ast.stmt]) -> set[str]:
    """Names that statements bind at a module's top level, type-checking blocks included."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.If):
            names |= _bound_names(node.body)
    return names


def _exports(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            exported: list[str] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return list(exported)
    return None


@pytest.mark.parametrize(
    "path", [path for path in MODULES if "__all__" in path.read_text(encoding="utf-8")], ids=str
)
def test_exports_exist_once(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    exported = _exports(tree)
    assert exported is not None
    assert len(set(exported)) == len(exported)
    assert set(exported) <= _bound_names(tree.body)


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=str)
def test_a_package_that_only_imports_exports_it_all(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body):
        return
    ours = [
        node
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGES)
    ]
    assert _bound_names(list(ours)) <= set(_exports(tree) or ())


def _requirements() -> list[Requirement]:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = (extras[name] for name in ("train", "dev", "bench"))
    return [Requirement(line) for line in sum(installed, project["dependencies"])]


def _pins() -> dict[str, str]:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in pairs}


def test_every_requirement_has_a_pin_in_its_range() -> None:
    pins = _pins()
    wrong = [
        str(requirement)
        for requirement in _requirements()
        if not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"))
    ]
    assert wrong == []


def test_whatever_the_requirements_pull_is_pinned() -> None:
    pins = _pins()
    todo = _requirements()
    seen: set[tuple[str, frozenset[str]]] = set()
    unpinned: set[str] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        if name not in pins:
            unpinned.add(name)
        try:
            children = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        todo += [
            child
            for child in map(Requirement, children)
            if child.marker is None
            or any(child.marker.evaluate({"extra": extra}) for extra in {"", *requirement.extras})
        ]
    assert len(seen) > len(_requirements())
    assert unpinned == set()


def test_ci_runs_what_the_makefile_offers() -> None:
    makefile = Path("Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    callers = [path for path in TRACKED if path.parts[0] in {".github", ".ci"}]
    called = {
        target
        for path in callers
        for target in re.findall(r"\bmake ([a-z-]+)", path.read_text(encoding="utf-8"))
    }
    assert {"check", "test"} <= called <= targets
