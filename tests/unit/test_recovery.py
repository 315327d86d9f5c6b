"""When a fault is worth another attempt, and which request is to blame for several."""

from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_ray.config import RecoveryConfig
from gllm_ray.engine.recovery import CrashLoop, PoisonSearch
from gllm_ray.errors import PipelineError
from gllm_ray.messages import FinishReason, TokenEvent


def make_loop(**options):
    return CrashLoop(RecoveryConfig(**options))


def note(loop, cause="x", now_s=0.0, **options):
    """What is to be waited, or the last words."""
    try:
        return loop.note_fault(PipelineError(cause), now_s, **options)
    except PipelineError as error:
        return str(error)


def gave_up(num_faults, first_cause="x"):
    return f"gave up after {num_faults} faults in a row; the first: {first_cause}"


def test_the_first_attempt_comes_at_once_and_each_next_one_later_up_to_a_bound():
    loop = make_loop(max_attempts=6, backoff_s=0.5, max_backoff_s=3)
    assert [note(loop) for _ in range(7)] == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0, gave_up(7)]


def test_the_first_cause_of_a_row_is_told():
    loop = make_loop(max_attempts=2)
    assert [note(loop, cause) for cause in ("a", "b", "c")][-1] == gave_up(3, "a")


def test_what_a_client_may_read_is_that_of_the_latest_cause():
    loop = make_loop(max_attempts=1)
    note(loop)
    with pytest.raises(PipelineError) as caught:
        loop.note_fault(PipelineError("on host h", public_message="lost"), 0.0)
    assert caught.value.public_message == "lost"


def test_a_row_ends_when_it_was_calm_long_enough_after_a_repair():
    loop = make_loop(max_attempts=1, calm_s=10)
    assert note(loop, "a") == 0.0
    loop.note_repair(now_s=5.0)
    assert note(loop, "b", now_s=15.0) == 0.0
    loop.note_repair(now_s=16.0)
    assert note(loop, "c", now_s=25.9) == gave_up(2, "b")


def test_the_time_of_a_repair_is_no_calm():
    loop = make_loop(max_attempts=1, calm_s=10)
    note(loop, "a")
    assert note(loop, "b", now_s=1000.0) == gave_up(2, "a")


def test_an_explained_fault_does_not_count_and_a_forgiven_row_is_over():
    loop = make_loop(max_attempts=1, calm_s=10)
    note(loop, "a")
    assert note(loop, "b", now_s=1.0, is_explained=True) == 0.0
    loop.note_repair(now_s=2.0)
    loop.forgive()
    assert note(loop, "c", now_s=3.0) == 0.0


@given(st.integers(1, 2000), st.floats(0, 10), st.floats(0, 100))
def test_a_delay_never_falls_and_never_exceeds_its_bound(max_attempts, backoff_s, more_s):
    loop = make_loop(
        max_attempts=max_attempts, backoff_s=backoff_s, max_backoff_s=backoff_s + more_s
    )
    delays = [note(loop) for _ in range(max_attempts)]
    assert delays == sorted(delays)
    assert delays[-1] <= backoff_s + more_s
    assert note(loop) == gave_up(max_attempts + 1)


def is_admitted(search, name):
    if search.alone is not None:
        return name in search.alone
    return name not in search.held_back


def waiting(search, names):
    """Those of some requests that may not run."""
    return {name for name in names if not is_admitted(search, name)}


class World:
    """Requests that need some tokens each, and stages that break when they compute a poison.

    Args:
        poisons: Of each request, the output tokens before the one that breaks the stages; None if
            none does.
        draw: A choice that the world leaves open, below a bound.
    """

    def __init__(self, poisons, max_running, draw):
        self.search = PoisonSearch()
        self.poisons = {f"r{i}": poison for i, poison in enumerate(poisons)}
        self.tokens = dict.fromkeys(self.poisons, 0)
        self.needed = {name: 1 + draw(4) for name in self.tokens}
        self.blamed = []
        self.num_faults = 0
        self._max_running = max_running
        self._draw = draw

    def run(self):
        while self.tokens:
            self._round()

    def _round(self):
        names = [n for n in self.tokens if is_admitted(self.search, n)]
        assert names, "everybody waits"
        running = names[: self._max_running]
        # Micro-batches come one after the other, and some are done before the stages break.
        while running:
            batch = [running.pop(0) for _ in range(1 + self._draw(len(running)))]
            if any(self.poisons[name] == self.tokens[name] for name in batch):
                self._break(batch + running[: self._draw(len(running) + 1)])
                return
            self.search.note_events([self._give_token(name) for name in batch])

    def _give_token(self, name):
        self.tokens[name] += 1
        is_last = self.tokens[name] >= self.needed[name] and self.poisons[name] is None
        if is_last:
            del self.tokens[name]
        return TokenEvent(name, 1, FinishReason.LENGTH if is_last else None)

    def _break(self, in_flight):
        self.num_faults += 1
        name = self.search.note_fault({name: self.tokens[name] for name in in_flight})
        if name is not None:
            self.blamed.append(name)
            del self.tokens[name]
            self.search.note_events([TokenEvent(name, None, FinishReason.ERROR)])


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from([None, None, None, 0, 1, 3]), min_size=1, max_size=40),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_every_poison_is_blamed_and_nobody_else(poisons, max_running, rng):
    world = World(poisons, max_running, rng.randrange)
    world.run()
    guilty = {f"r{i}" for i, poison in enumerate(poisons) if poison is not None}
    assert set(world.blamed) == guilty
    assert len(world.blamed) == len(guilty)
    assert not waiting(world.search, guilty)


@given(st.integers(1, 512), st.data())
def test_one_poison_among_many_is_found_in_a_logarithmic_number_of_faults(num_requests, data):
    poison = data.draw(st.integers(0, num_requests - 1))
    poisons = [0 if i == poison else None for i in range(num_requests)]
    # All of them fly in one micro-batch, so nobody gets a token that could clear him.
    world = World(poisons, num_requests, lambda bound: bound - 1)
    world.run()
    assert world.blamed == [f"r{poison}"]
    assert world.num_faults <= 2 + ceil(log2(num_requests)) + 2


def test_who_got_a_token_between_two_faults_is_no_suspect():
    search = PoisonSearch()
    search.note_fault({"a": 3, "b": 0})
    search.note_fault({"a": 4, "c": 0})
    assert not waiting(search, "abc")


def test_a_fault_with_nobody_on_trial_in_flight_blames_nobody():
    search = PoisonSearch()
    search.note_fault({"a": 0})
    search.note_fault({"a": 0})
    assert search.alone == {"a"}
    assert search.note_fault({}) is None
    assert not search.is_explained
    assert search.alone == {"a"}
    assert [search.note_fault({"a": 0}) for _ in range(2)] == [None, "a"]


def test_who_comes_during_a_search_runs_along_and_is_a_suspect_once_a_trial_broke():
    search = PoisonSearch()
    for _ in range(2):
        search.note_fault(dict.fromkeys("abcd", 0))
    assert waiting(search, ["a", "b", "c", "d", "late"]) == {"c", "d"}
    search.note_fault({"a": 0, "b": 0, "late": 0})
    assert search.alone is None or "late" not in search.alone
    assert "late" in search.held_back


def test_a_request_that_failed_alone_is_tried_again_after_the_others_unless_they_got_tokens():
    search = PoisonSearch()
    for _ in range(2):
        search.note_fault({"a": 0, "b": 0})
    assert search.note_fault({"a": 0}) is None
    assert search.alone == {"b"}
    search.note_events([TokenEvent("b", 1)])
    assert not waiting(search, "ab")
    assert search.note_fault({"a": 0, "b": 1}) is None
    assert search.alone == {"a"}
    assert search.note_fault({"a": 0}) == "a"


def test_groups_whose_members_all_ended_stop_nobody():
    search = PoisonSearch()
    for _ in range(2):
        search.note_fault(dict.fromkeys("abcd", 0))
    assert waiting(search, "abcd") == {"c", "d"}
    search.note_events([TokenEvent(name, None, FinishReason.ABORT) for name in "cd"])
    search.note_fault({"a": 0, "b": 0})
    assert search.alone == {"a"}


def test_suspects_that_end_on_their_own_end_the_search():
    search = PoisonSearch()
    for _ in range(2):
        search.note_fault({"a": 0, "b": 0, "c": 0})
    assert waiting(search, "abc") == {"c"}
    assert not search.note_events([TokenEvent("c", None, FinishReason.ABORT)])
    assert search.note_events([TokenEvent(n, None, FinishReason.ABORT) for n in "ab"])
    assert not waiting(search, "abc")


def test_a_trial_that_breaks_while_others_get_tokens_explains_its_fault():
    search = PoisonSearch()
    for _ in range(2):
        search.note_fault({"a": 0, "b": 0})
        assert not search.is_explained
    assert search.alone == {"a"}
    search.note_events([TokenEvent("a", 1)])
    assert not waiting(search, "ab")
    assert search.note_fault({"a": 1, "b": 0}) is None
    assert search.is_explained
    assert search.alone == {"b"}
    assert search.note_fault({"b": 0}) == "b"  # "a" got a token since the search began
    assert search.is_solved


def test_an_innocent_that_breaks_the_pipeline_at_a_later_token_is_a_suspect_again():
    search = PoisonSearch()
    for _ in range(2):
        search.note_fault({"a": 0, "b": 0})
    search.note_events([TokenEvent("a", 1)])  # "b" is on trial now, and waits for room
    assert search.note_fault({"a": 1}) is None
    assert not is_admitted(search, "a")
    search.note_events([TokenEvent("b", 1)])
    assert is_admitted(search, "a")
    assert search.note_fault({"a": 1}) == "a"


def test_a_trial_explains_its_fault_only_if_requests_got_tokens_since_the_one_before():
    search = PoisonSearch()
    for _ in range(2):
        search.note_fault(dict.fromkeys("abcd", 0))
    assert search.note_events([TokenEvent("a", 1)]) is False
    search.note_fault({"a": 1, "b": 0})
    assert search.is_explained
    search.note_fault({"b": 0})
    assert not search.is_explained


def test_who_got_a_token_on_trial_is_innocent_though_others_broke_it():
    search = PoisonSearch()
    for _ in range(2):
        search.note_fault(dict.fromkeys("abcd", 0))
    search.note_events([TokenEvent("a", 1)])
    search.note_fault({"a": 1, "b": 0})
    assert search.alone == {"b"}
    search.note_events([TokenEvent("b", 1)])
    assert not waiting(search, "abcd")
    search.note_fault({"a": 1, "b": 1, "c": 0, "d": 0})
    assert search.held_back == {"d"}


def test_a_search_begins_anew_whatever_one_before_it_found():
    search = PoisonSearch()
    for _ in range(2):
        search.note_fault({"a": 0, "b": 0})
    search.note_events([TokenEvent("a", 1)])
    assert search.note_fault({"b": 0}) == "b"
    assert search.is_solved
    assert search.is_explained
    for _ in range(2):
        search.note_fault({"c": 0, "d": 0})
        assert not search.is_solved
        assert not search.is_explained
    search.note_events([TokenEvent("c", 1)])
    search.note_events([TokenEvent("d", 1)])
    assert search.held_back == set()
    assert not search.is_solved
    assert [search.note_fault({"e": 0}) for _ in range(4)] == [None, None, None, "e"]
