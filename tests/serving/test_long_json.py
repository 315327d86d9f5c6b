"""JSON that is spelled in parts says what it says as a whole."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.serving import long_json
from gllm_ray.serving.long_json import dump_long

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.integers(1, 3))
def test_the_parts_make_the_whole(value, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_json, "_STEP", step)
        assert dump_long(value) == json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": [{}, {"b": float("nan")}]}])
def test_what_json_does_not_know_is_refused(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_long(value)
