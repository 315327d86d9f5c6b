"""Whether a published ratio is found again."""

from typing import Literal

Verdict = Literal["reproduced", "direction only", "not reproduced"]


def verdict(published: tuple[float, float], ours: float, tolerance: float) -> Verdict:
    """Compare a ratio of two runs with the one that is published of them.

    Args:
        published: Least and most of what is printed; `(1, inf)`: that the first one leads.
        ours: The ratio here.
        tolerance: Share by which the magnitude may miss them.
    """
    least, most = published
    is_above = most > 1
    if ours == 1 or (ours > 1) != is_above:
        return "not reproduced"
    is_near = least * (1 - tolerance) <= ours <= most * (1 + tolerance)
    return "reproduced" if is_near else "direction only"
