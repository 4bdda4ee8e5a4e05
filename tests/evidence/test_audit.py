import importlib

import pytest

from course_lib.evidence import audit

ROOMS = ("classes", "exemplars", "churn", "corruption", "saliency", "map_agreement", "pareto")


@pytest.mark.parametrize("room", ROOMS)
def test_the_door_opens_to_everything_public(room):
    module = importlib.import_module(f"course_lib.evidence.{room}")
    for name in set(module.__all__) - {"check_predictions"}:
        assert name in audit.__all__
        assert getattr(audit, name) is getattr(module, name)


def test_the_list_names_what_is_there():
    assert sorted(audit.__all__) == sorted(set(audit.__all__))
    assert all(hasattr(audit, name) for name in audit.__all__)
