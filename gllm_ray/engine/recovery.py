"""What to do about a fault of the pipeline: try again, give up, or look for the request to blame.

Nothing here has a clock or does anything: the engine tells what happened and when.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from itertools import islice

from gllm_ray.config import RecoveryConfig
from gllm_ray.errors import PipelineError
from gllm_ray.messages import TokenEvent


class CrashLoop:
    """Counts faults in a row, and says how long to wait before the next attempt.

    Args:
        config: How many there may be, and what ends a row.
    """

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config
        self._first_cause = ""
        self._num_faults = 0  # in the row
        self._calm_at_s = float("-inf")

    def note_fault(
        self, error: PipelineError, now_s: float, *, is_explained: bool = False
    ) -> float:
        """Count a fault, unless it is explained by something else than the stages' state.

        Returns:
            Seconds to wait before the pipeline is repaired.

        Raises:
            PipelineError: To give up; tells the first cause of the row.
        """
        if now_s >= self._calm_at_s:
            self._num_faults, self._first_cause = 0, str(error)
        self._calm_at_s = float("inf")  # until the repair
        if is_explained:
            return 0.0
        self._num_faults += 1
        if self._num_faults > self._config.max_attempts:
            raise PipelineError(
                f"gave up after {self._num_faults} faults in a row; the first: {self._first_cause}",
                public_message=error.public_message,
            )
        if self._num_faults == 1:
            return 0.0
        # The exponent is bounded because a float's is.
        delay_s = self._config.backoff_s * 2.0 ** min(self._num_faults - 2, 64)
        return min(delay_s, self._config.max_backoff_s)

    def note_repair(self, now_s: float) -> None:
        """The pipeline works again; from here on the calm counts."""
        self._calm_at_s = now_s + self._config.calm_s

    def forgive(self) -> None:
        """What caused the faults is gone: the next one is the first in a row."""
        self._calm_at_s = float("-inf")


class PoisonSearch:
    """Finds requests that break the pipeline each time they run.

    Prefill repeats all that a request has computed. So one that breaks the pipeline when it
    computes a certain token does so again before it gets another output token: who was in flight at
    two faults and got no token in between is a suspect. The suspects are tried in halves while the
    rest of them wait. A group that breaks the pipeline is halved again, and one whose members all
    get a token, or end, is innocent and runs on. Who is no suspect, or comes later, runs along, and
    is a suspect too if it was in flight when a trial broke. A single request is to blame if it
    breaks the pipeline with nobody else in flight; and does so twice, unless others got tokens
    since the search began: it may be the stages that are broken.

    So each fault narrows the search or widens it to who was in flight: who was found innocent is a
    suspect again if it was in flight at a fault that is not the trial's. The search ends after
    about 2 log2(n) faults of n suspects if one is to blame for all of them.

    Attributes:
        is_explained: The latest fault was that of a trial, and requests got tokens since the one
            before it; so the stages work, and the trial is to blame.
        is_solved: The latest search found who is to blame, and who is innocent.
    """

    def __init__(self) -> None:
        self._before: dict[str, int] = {}  # output tokens of those in flight at the latest fault
        self._groups: deque[list[str]] = deque()  # to try, the one on trial first
        self._on_trial: set[str] = set()  # of its members those that got no token yet
        self._innocent: set[str] = set()
        self._is_alone = False  # all others wait, those too that are no suspects
        self._has_blamed = False
        self._has_progress = False  # since the latest fault
        self._is_working = False  # somebody got a token since the search began
        self._failed_alone: set[str] = set()
        self.is_explained = False
        self.is_solved = False

    @property
    def alone(self) -> AbstractSet[str] | None:
        """The only requests that may run now; None: all may that are not held back."""
        return set(self._groups[0]) if self._groups and self._is_alone else None

    @property
    def held_back(self) -> AbstractSet[str]:
        """The suspects that are not on trial."""
        return set().union(*islice(self._groups, 1, None))

    def note_fault(self, in_flight: Mapping[str, int]) -> str | None:
        """The pipeline broke.

        Args:
            in_flight: The requests whose work was lost, and the output tokens of each so far.

        Returns:
            The request to blame, if it is found; the caller ends it.
        """
        has_progress, self._has_progress = self._has_progress, False
        self.is_explained = self.is_solved = False
        if self._groups:
            guilty = [n for n in self._groups[0] if n in self._on_trial and n in in_flight]
            if not guilty:  # a token proves only so much: one of these broke at a later one
                self._innocent.difference_update(in_flight)
            known = self._innocent.union(*self._groups)
            if newcomers := [name for name in in_flight if name not in known]:
                self._groups.append(newcomers)
            self.is_explained = has_progress and bool(guilty)
            return self._narrow(guilty, in_flight) if guilty else None
        suspects = [name for name, count in in_flight.items() if self._before.get(name) == count]
        if in_flight:
            self._before = dict(in_flight)
        if suspects:
            self._groups.extend(_halves(suspects))
            self._start_trial()
        return None

    def note_events(self, events: Iterable[TokenEvent]) -> bool:
        """Requests got tokens, or ended.

        Returns:
            Whether others may run now.
        """
        if not self._groups:
            return False
        for event in events:
            self._on_trial.discard(event.request_id)
            self._has_progress |= event.token_id is not None
            self._is_working |= event.token_id is not None
            if event.finish_reason is not None:
                self._forget(event.request_id)
        if self._on_trial:
            return False
        while self._groups and not self._on_trial:
            self._innocent.update(self._groups.popleft())
            self._start_trial()
            self._is_alone = False  # the innocent run already
        return True

    def _narrow(self, guilty: list[str], in_flight: Mapping[str, int]) -> str | None:
        """The group on trial broke the pipeline, by those of it that were in flight."""
        others = [name for name in self._groups.popleft() if name not in guilty]
        self._innocent.update(set(others) - self._on_trial)
        if untried := [name for name in others if name in self._on_trial]:
            self._groups.append(untried)
        blamed = None
        if len(guilty) > 1:
            self._groups.extend(_halves(guilty))
        elif len(in_flight) > 1:
            self._groups.appendleft(guilty)
        elif not self._is_working and guilty[0] not in self._failed_alone:
            self._failed_alone.update(guilty)
            self._groups.append(guilty)  # the others first
        else:
            blamed = guilty[0]
            self._has_blamed = True
        self._start_trial()
        return blamed

    def _start_trial(self) -> None:
        while self._groups and not self._groups[0]:
            self._groups.popleft()  # all of it ended
        self._on_trial = set(self._groups[0]) if self._groups else set()
        self._is_alone = len(self._on_trial) == 1
        if not self._groups:
            self.is_solved = self._has_blamed and bool(self._innocent)
            self._before, self._innocent, self._has_blamed = {}, set(), False
            self._is_working, self._failed_alone = False, set()

    def _forget(self, name: str) -> None:
        for group in self._groups:
            if name in group:
                group.remove(name)


def _halves(names: list[str]) -> list[list[str]]:
    half = (len(names) + 1) // 2
    return [part for part in (names[:half], names[half:]) if part]
