"""Where requests go whose prompts begin alike."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.routing import PrefixRouter, RoutedPrompt

REPLICAS = ["a", "b", "c", "d"]


def prompt(prefix=None, num_tokens=1100, num_prefix_tokens=1000):
    keys = () if prefix is None else (prefix,)
    return RoutedPrompt(num_tokens=num_tokens, keys=keys, tokens_per_key=num_prefix_tokens)


def router(**options):
    return PrefixRouter(Random(0), **{"request_tokens": 100.0} | options)


def send(router, prompt, replicas=REPLICAS):
    replica = router.choose(replicas, prompt)
    return replica, router.start(replica, prompt)


def test_a_request_follows_its_prefix_until_the_queue_there_costs_more():
    routing = router()
    home, first = send(routing, prompt("p"))
    assert first == 1200.0  # nothing was cached
    routing.end(home, first)
    sent = [send(routing, prompt("p")) for _ in range(12)]
    # A follower costs 200, the prefix 1000 on top: elsewhere is cheaper once six wait there.
    assert sent[:6] == [(home, 200.0)] * 6
    assert {replica for replica, _ in sent[6:]} != {home}


def test_without_a_prefix_the_emptier_of_two_is_taken():
    routing = router()
    for _ in range(400):
        send(routing, prompt())
    work = [routing.work_of(replica) for replica in REPLICAS]
    assert max(work) - min(work) <= 3 * 1200.0


def test_a_replica_that_holds_more_of_the_beginning_is_better():
    routing = router()
    tokens = list(range(256))
    routing.end("a", routing.start("a", RoutedPrompt.of_tokens(tokens[:128])))
    routing.end("b", routing.start("b", RoutedPrompt.of_tokens(tokens)))
    longer = RoutedPrompt.of_tokens([*tokens, *range(100)])
    assert [routing.choose(REPLICAS, longer) for _ in range(20)] == ["b"] * 20
    assert routing.cost_tokens("a", longer) - routing.cost_tokens("b", longer) == 128


def test_of_holders_of_the_same_beginning_the_one_with_the_least_work_is_taken():
    routing = router()
    routing.end("b", routing.start("b", prompt("p")))
    for busy in ("a", "c"):
        routing.start(busy, prompt("p"))
    assert {routing.choose(REPLICAS, prompt("p")) for _ in range(20)} == {"b"}


@given(st.integers(0, 200), st.integers(0, 200))
def test_prompts_share_the_keys_of_the_whole_pieces_that_they_begin_with(num_common, num_more):
    common, more = range(num_common), range(num_more)
    one, other = (RoutedPrompt.of_tokens([*common, last, *more]) for last in (201, 202))
    assert len(one.keys) == one.num_tokens // one.tokens_per_key
    shared = num_common // one.tokens_per_key
    assert one.keys[:shared] == other.keys[:shared]
    assert not set(one.keys[shared:]) & set(other.keys)
    salted = RoutedPrompt.of_tokens([*common, 201, *more], "salt")
    assert not set(salted.keys) & set(one.keys)


def test_a_prefix_that_is_used_again_outlives_one_that_is_not():
    routing = router(max_keys=2)
    for prefix in ("used", "unused", "used", "new"):
        routing.start("a", prompt(prefix))
    assert [routing.cost_tokens("a", prompt(p)) for p in ("used", "unused")] == [200.0, 1200.0]


def test_what_was_used_last_is_remembered_and_the_beginning_longest():
    routing = router(max_keys=3)
    long = RoutedPrompt(num_tokens=500, keys=(1, 2, 3, 4, 5), tokens_per_key=100)
    routing.start("a", long)
    assert routing.cost_tokens("a", long) == 300.0
    routing.start("a", RoutedPrompt(num_tokens=100, keys=(9,), tokens_per_key=100))
    assert routing.cost_tokens("a", long) == 400.0


def test_a_replica_that_has_gone_is_never_chosen_for_what_it_held():
    routing = router()
    home, _ = send(routing, prompt("p"))
    routing.forget(home)
    assert routing.work_of(home) == 0.0
    others = [replica for replica in REPLICAS if replica != home]
    assert routing.choose(others, prompt("p")) in others
    routing.end(home, 1200.0)  # ends later
    assert routing.work_of(home) == 0.0


calls = st.lists(
    st.tuples(st.sampled_from(["send", "end", "forget"]), st.integers(0, 9), st.integers(0, 3)),
    max_size=60,
)


@given(calls)
def test_all_work_is_gone_when_all_has_ended_and_nothing_is_kept_of_who_has_gone(calls):
    routing, open_requests = router(max_keys=4), []
    for call, prefix, number in calls:
        replica = REPLICAS[number]
        if call == "send":
            open_requests.append(send(routing, prompt(prefix), [*REPLICAS[: number + 1]]))
        elif call == "end" and open_requests:
            routing.end(*open_requests.pop(number % len(open_requests)))
        elif call == "forget":
            open_requests = [each for each in open_requests if each[0] != replica]
            routing.forget(replica)
    for each in open_requests:
        routing.end(*each)
    assert all(routing.work_of(replica) == 0 for replica in REPLICAS)
    for replica in REPLICAS:
        routing.forget(replica)
    assert not routing._holders
