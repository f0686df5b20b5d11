import pytest

from deployments.engine.speculation.drafters.load import load_drafter
from deployments.engine.speculation.drafters.suffix import SuffixDrafter
from deployments.engine.speculation.errors import DrafterLoadError


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
        ("json:__name__", "not a class"),
        ("collections:OrderedDict", "built a OrderedDict"),
    ],
)
def test_what_cannot_be_loaded_says_why(spec, reason):
    with pytest.raises(DrafterLoadError, match=reason):
        load_drafter(spec)
