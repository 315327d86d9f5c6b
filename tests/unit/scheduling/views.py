"""The load of the papers' worked example: 4 stages, 96 decodes, 6144 waiting, 60 % free."""

from typing import Any, NamedTuple

from gllm_ray.scheduling.load import LoadView, StepLoad


class Length(NamedTuple):
    """What a policy knows of a sequence."""

    num_tokens: int
    num_expected_tokens: int


class TokenCost:
    """A cost model that knows no seconds: every token costs the same."""

    is_calibrated = False
    tile = 1

    def stage_time(self, load: StepLoad) -> float:
        return float(load.num_tokens)

    def observe(self, load: StepLoad, time_s: float) -> None:
        raise AssertionError("no policy measures")


def view(**changes: Any) -> LoadView:
    values: dict[str, Any] = {
        "now_s": 0.0,
        "batch_id": 0,
        "num_stages": 4,
        "num_in_flight": 0,
        "num_tokens_in_flight": 0,
        "max_in_flight": changes.get("num_stages", 4),
        "crowding": 1.0,
        "num_arrivals": 200,
        "num_waiting_tokens": 6144,
        "num_waiting_token_steps": 10**6,
        "num_prefilling": 0,
        "prefill_start": 0,
        "num_decoding": 96,
        "num_ready": 24,
        "num_context_tokens": 6144,
        "num_live": 96,
        "num_prefills_in_flight": 0,
        "num_remaining_tokens": 0,
        "oldest_token_s": 0.0,
        "num_preemptions": 0,
        "num_blocks": 1000,
        "num_free_blocks": 600,
        "block_size": 16,
        "kv_free_ratio": 0.6,
        "max_decodes": 512,
        "cost": TokenCost(),
        "head": None,
        "waiting": (),
        "live": (),
    }
    return LoadView(**(values | changes))


def view_of(
    live: list[tuple[int, int]] | tuple[()] = (),
    waiting: list[tuple[int, int]] | tuple[()] = (),
    **changes: Any,
) -> LoadView:
    """The load of sequences of these (tokens, expected tokens); the live ones all ready to decode.

    Other than in the worked example, the numbers agree with each other.
    """
    block_size = changes.get("block_size", 16)
    num_blocks = changes.get("num_blocks", 1000)
    num_used = sum(-(-length // block_size) for length, _ in live)
    values: dict[str, Any] = {
        "num_waiting_tokens": sum(length for length, _ in waiting),
        "num_decoding": len(live),
        "num_ready": len(live),
        "num_context_tokens": sum(length for length, _ in live),
        "num_live": len(live),
        "num_remaining_tokens": sum(expected for _, expected in live),
        "num_free_blocks": num_blocks - num_used,
        "kv_free_ratio": 1 - num_used / num_blocks,
        "oldest_token_s": 0.0 if live else None,
        "live": [Length(*item) for item in live],
        "head": Length(*waiting[0]) if waiting else None,
        "waiting": [Length(*item) for item in waiting],
    }
    return view(**(values | changes))
