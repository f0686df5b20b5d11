import pytest

from deployments.engine.speculation.drafters.load import load_drafter
from deployments.engine.speculation.drafters.suffix import SuffixDrafter
from deployments.engine.speculation.errors import DrafterLoadError


def no_drafter():
    raise KeyError("no phrases")


def test_built_in_and_named_drafters():
    assert isinstance(load_drafter("suffix"), SuffixDrafter)
    loaded = load_drafter("deployments.engine.speculation.drafters.suffix:SuffixDrafter")
    assert isinstance(loaded, SuffixDrafter)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "neither"),
        ("sufix", "neither"),
        ("module:", "neither"),
        ("no.such.module:Name", "cannot be imported"),
        ("json:NoSuchName", "cannot be imported"),
        ("divides_by_zero:Name", r"cannot be imported: ZeroDivisionError\("),
        ("json:__name__", "not a class"),
        (f"{__name__}:no_drafter", r"cannot be built: KeyError\('no phrases'\)"),
        ("collections:OrderedDict", "built a OrderedDict"),
    ],
)
def test_what_cannot_be_loaded_says_why(spec, reason, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "divides_by_zero.py").write_text("1 / 0")
    with pytest.raises(DrafterLoadError, match=reason):
        load_drafter(spec)
