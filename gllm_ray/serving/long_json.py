"""JSON of long lists, spelled so that other threads get their turns meanwhile."""

import json

# Elements of a list that are spelled at once, while all other threads wait.
_STEP = 128


def dump_long(value: object) -> str:
    """The JSON of a value that has long lists, or lists of what has.

    Raises:
        ValueError: A number is infinite or none.
    """
    if isinstance(value, dict):
        fields = (f"{_dump(name)}:{dump_long(field)}" for name, field in value.items())
        return f"{{{','.join(fields)}}}"
    if not isinstance(value, list | tuple):
        return _dump(value)
    if value and isinstance(value[-1], dict) and len(value) <= _STEP:
        return f"[{','.join(map(dump_long, value))}]"
    parts = (_dump(value[first : first + _STEP])[1:-1] for first in range(0, len(value), _STEP))
    return f"[{','.join(parts)}]"


def _dump(value: object) -> str:
    # ASCII, because a client's text may hold what UTF-8 cannot encode.
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
