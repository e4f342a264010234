"""What a resume is told of a configuration that differs from the one saved."""

import json

import pytest

from dinov2.configs import Config, load_config, public_config
from dinov2.train.state import changes, check_resumable
from tests.helpers.runs import TINY

PLAIN = (*TINY, "data.path=x")
STEP = "augmentation.steps={rotate90: {prob: 0.75}}"


def saved(config: Config) -> dict:
    return json.loads(json.dumps(public_config(config)))


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ((), (STEP,), {"augmentation.steps.rotate90.prob"}),
        ((STEP,), (), {"augmentation.steps.rotate90.prob"}),
        ((STEP,), ("augmentation.steps={rotate90: {prob: 0.5}}",), {"augmentation.steps.rotate90.prob"}),
        ((STEP,), (STEP,), set()),
        (("optim.base_lr=1",), ("optim.base_lr=2",), {"optim.base_lr"}),
        (("student.options={a: 1}",), (), {"student.options"}),
    ],
)
def test_values_that_changed_were_added_or_left_out(before: tuple, now: tuple, told: set):
    one, other = (load_config(None, [*PLAIN, *overrides]) for overrides in (before, now))
    assert changes(saved(one), other).keys() == told
    if told - {"student.options"}:
        with pytest.raises(ValueError, match=r"train\.allow_changes"):
            check_resumable({"config": saved(one), "global_batch": 8}, other)


def test_keys_of_an_earlier_version_are_no_changes():
    config = load_config(None, PLAIN)
    assert changes(saved(config) | {"gone": {"key": 1}}, config) == {}
