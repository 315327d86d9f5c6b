"""Waiting sequences by the output they are expected to produce."""

from collections.abc import Mapping

from gllm_ray.scheduling.sequence import Sequence


class LongOutputs:
    """Finds the longest expected output among the members of the lowest priority.

    Sorts them when it is first asked, and again after one has come; those that leave need not tell.

    Args:
        members: The sequences by id.
    """

    def __init__(self, members: Mapping[int, Sequence]) -> None:
        self._members = members
        self._keys: list[tuple[float, int, float, int]] | None = None  # the first one last

    def note_arrival(self) -> None:
        """A member has come."""
        self._keys = None

    def first(self) -> Sequence | None:
        """That member; of equals the one of the lowest rank."""
        if self._keys is None:
            self._keys = sorted(
                (-sequence.rank[0], sequence.num_expected_tokens, -sequence.rank[1], -seq_id)
                for seq_id, sequence in self._members.items()
            )
        while self._keys and -self._keys[-1][-1] not in self._members:
            self._keys.pop()
        return self._members[-self._keys[-1][-1]] if self._keys else None
