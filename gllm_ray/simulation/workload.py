"""The requests of a workload in the order of their arrival, made as they are asked for."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from random import Random

from gllm_ray.simulation.arrivals import arrival_times
from gllm_ray.simulation.lengths import RequestLengths
from gllm_ray.simulation.simulated_request import SimulatedRequest
from gllm_ray.simulation.traces import read_trace
from gllm_ray.simulation.workload_config import (
    RecordedArrivalsConfig,
    SharedPrefixesConfig,
    SyntheticWorkloadConfig,
    TenantConfig,
    TraceWorkloadConfig,
)


class Workload:
    """An iterable of requests that gives the same ones every time, in constant memory.

    Arrivals, lengths, prefixes and tenants are drawn from streams of their own: another rate
    leaves the lengths as they are, so that loads are compared by the same requests.

    Args:
        config: What the requests are like.
        seed: Of everything that is drawn.
        share: One of every `share` requests is drawn, and keeps its time: what one of `share`
            replicas gets.
    """

    def __init__(
        self, config: SyntheticWorkloadConfig | TraceWorkloadConfig, seed: int, *, share: int = 1
    ) -> None:
        self._config = config
        self._seed = seed
        self._share = share

    def __iter__(self) -> Iterator[SimulatedRequest]:
        """The requests from the first on.

        Raises:
            ConfigError: A trace cannot be read.
        """
        config, is_drawn = self._config, _one_of_every(self._share, self._stream("share"))
        hint_rng = self._stream("hints")
        requests = (
            self._traced(config) if isinstance(config, TraceWorkloadConfig) else self._drawn(config)
        )
        for request in islice(requests, config.num_requests):
            arrival_s = request.arrival_s / config.rate_scale
            if config.duration_s is not None and arrival_s > config.duration_s:
                return
            if config.hint_sigma is not None:
                request = _with_hint(request, config.hint_sigma, hint_rng)
            if next(is_drawn):
                max_tokens = request.max_tokens if config.max_tokens is None else config.max_tokens
                yield replace(request, arrival_s=arrival_s, max_tokens=max_tokens)

    def _stream(self, purpose: str) -> Random:
        return Random(f"{self._seed} {purpose}")

    def _drawn(self, config: SyntheticWorkloadConfig) -> Iterator[SimulatedRequest]:
        lengths = RequestLengths(config.lengths)
        rng = self._stream("lengths")
        prefixes = _prefixes(config.shared_prefixes, self._stream("prefixes"))
        tenants = _tenants(config.tenants, self._stream("tenants"))
        for arrival_s in arrival_times(config.arrivals, self._stream("arrivals")):
            num_prompt_tokens, num_output_tokens = lengths.sample(rng)
            prefix_id, num_prefix_tokens = next(prefixes)
            tenant, priority = next(tenants)
            yield SimulatedRequest(
                arrival_s=arrival_s,
                num_prompt_tokens=num_prefix_tokens + num_prompt_tokens,
                num_output_tokens=num_output_tokens,
                prefix_id=prefix_id,
                num_prefix_tokens=num_prefix_tokens,
                tenant=tenant,
                priority=priority,
            )

    def _traced(self, config: TraceWorkloadConfig) -> Iterator[SimulatedRequest]:
        path = Path(config.path)
        if not isinstance(config.arrivals, RecordedArrivalsConfig):
            times = arrival_times(config.arrivals, self._stream("arrivals"))
            for arrival_s, request in zip(
                times, read_trace(path, has_arrivals=False), strict=False
            ):
                yield replace(request, arrival_s=arrival_s)
            return
        for request in read_trace(path):
            if config.end_s is not None and request.arrival_s >= config.end_s:
                return
            if request.arrival_s >= config.start_s:
                yield replace(request, arrival_s=request.arrival_s - config.start_s)


def _one_of_every(count: int, rng: Random) -> Iterator[bool]:
    """For each request whether it is drawn; the first is, so that there is one."""
    drawn = 0
    while True:
        yield from (index == drawn for index in range(count))
        drawn = rng.randrange(count)


def _with_hint(request: SimulatedRequest, sigma: float, rng: Random) -> SimulatedRequest:
    """The same from a client that says how long its output will be."""
    hint = request.num_output_tokens * rng.lognormvariate(0, sigma)
    return replace(request, expected_output_tokens=max(1, round(hint)))


def _prefixes(config: SharedPrefixesConfig | None, rng: Random) -> Iterator[tuple[int | None, int]]:
    """The prefix of each request, 0 the most popular, and its length."""
    if config is None:
        while True:
            yield None, 0
    ranks = range(config.count)
    weights = list(accumulate((rank + 1) ** -config.zipf_exponent for rank in ranks))
    while True:
        yield rng.choices(ranks, cum_weights=weights)[0], config.tokens


def _tenants(configs: tuple[TenantConfig, ...], rng: Random) -> Iterator[tuple[str, int]]:
    """The tenant of each request, and its priority."""
    if not configs:
        while True:
            yield "", 0
    weights = list(accumulate(tenant.share for tenant in configs))
    while True:
        tenant = rng.choices(configs, cum_weights=weights)[0]
        yield tenant.name, tenant.priority
