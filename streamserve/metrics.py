"""What is counted, in Prometheus' terms. One object per server; torch-free.

Owns names, help texts and buckets. Names follow SGLang's where it has them, with our prefix. Knows nothing of HTTP: `render`
gives the bytes and their content type. Implements engine.core.StepObserver.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from streamserve.messages import EngineLoad

_LATENCY_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class _Tally(Collector):
    """A histogram that is told of every token: a third of the cost of prometheus_client's, which locks. For one thread."""

    def __init__(self, name: str, help: str, bounds_s: tuple[float, ...]) -> None:
        self._name = name
        self._help = help
        self._bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(self._bounds_s, seconds)] += 1
        self._sum_s += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """See Collector."""
        names = [*map(floatToGoString, self._bounds_s), "+Inf"]
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._help, buckets=buckets, sum_value=self._sum_s)


class Metrics:
    """Counters, gauges and histograms of one server. All methods are cheap and never block."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("num_requests", "Requests that ended, by outcome", ("outcome",))
        self._preemptions = self._counter("num_preemptions", "Running requests sent back to the queue for lack of KV pages")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that ended, cached ones included")
        self._cached_tokens = self._counter("cached_tokens", "Prompt tokens taken from the prefix cache")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated for requests that ended")
        self._images = self._counter("images", "Pictures in the prompts of requests that ended")
        self._jumped_tokens = self._counter("jumped_tokens", "Tokens that a grammar forced and that cost no step of their own")
        self._drafted_tokens = self._counter("drafted_tokens", "Guesses of answers' tokens that were computed")
        self._accepted_tokens = self._counter("accepted_tokens", "Of drafted_tokens those that were right")
        self._encoded_media = self._counter("encoded_media", "Pictures that went through the encoder; others were in a cache")
        self._num_drafted = self._num_accepted = 0
        self._step_tokens = self._counter("step_tokens", "Tokens computed in steps, prompts and decode rows together")
        self._running = self._gauge("num_running_reqs", "Requests in the running set")
        self._waiting = self._gauge("num_queue_reqs", "Requests that wait")
        self._total = self._gauge("max_total_num_tokens", "KV tokens that fit")
        self._available = self._gauge("kv_available_tokens", "KV tokens that are free")
        self._evictable = self._gauge("kv_evictable_tokens", "KV tokens that hold unused prefixes")
        self._usage = self._gauge("token_usage", "Share of KV tokens held by running requests, 0 to 1")
        self._step_s = self._histogram("step_seconds", "Time of one engine step", _TOKEN_S)
        self._ttft_s = self._histogram("time_to_first_token_seconds", "From submission to the first token", _LATENCY_S)
        self._token_s = _Tally("streamserve_inter_token_latency_seconds", "Time per token after the first", _TOKEN_S)
        self.registry.register(self._token_s)
        self._request_s = self._histogram("e2e_request_latency_seconds", "From submission to the end", _LATENCY_S)

    # ---- engine --------------------------------------------------------------------------------------------------

    def step_finished(self, *, seconds: float, num_rows: int, num_tokens: int, load: EngineLoad) -> None:
        """A step of `num_rows` rows and `num_tokens` tokens was taken in."""
        self._step_s.observe(seconds)
        self._step_tokens.inc(num_tokens)
        self.set_load(load)

    def request_preempted(self) -> None:
        """A running request went back to the queue."""
        self._preemptions.inc()

    def tokens_jumped(self, num_tokens: int) -> None:
        """So many tokens joined answers without a step of their own."""
        self._jumped_tokens.inc(num_tokens)

    def tokens_drafted(self, num_drafted: int, num_accepted: int) -> None:
        """So many guesses of answers' tokens were computed, and so many of them were right."""
        self._num_drafted += num_drafted
        self._num_accepted += num_accepted
        self._drafted_tokens.inc(num_drafted)
        self._accepted_tokens.inc(num_accepted)

    def media_encoded(self, count: int) -> None:
        """So many pictures went through the encoder."""
        self._encoded_media.inc(count)

    @property
    def drafts(self) -> tuple[int, int]:
        """Guesses computed since the start, and those of them that were right."""
        return self._num_drafted, self._num_accepted

    def set_load(self, load: EngineLoad) -> None:
        """The engine's load right now."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._total.set(load.total_tokens)
        self._available.set(load.free_tokens)
        self._evictable.set(load.evictable_tokens)
        held = load.total_tokens - load.free_tokens - load.evictable_tokens
        self._usage.set(held / load.total_tokens if load.total_tokens else 0.0)

    # ---- API -----------------------------------------------------------------------------------------------------

    def first_token(self, seconds: float) -> None:
        """The first token of a request came `seconds` after its submission."""
        self._ttft_s.observe(seconds)

    def next_tokens(self, num_tokens: int, seconds: float) -> None:
        """A later delta of `num_tokens` (at least 1) came `seconds` after the one before."""
        self._token_s.observe(seconds / num_tokens)

    def request_finished(
        self,
        outcome: str,
        *,
        seconds: float,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        generation_tokens: int = 0,
        num_images: int = 0,
    ) -> None:
        """A request ended. `outcome` is a FinishReason, or the `code` of the error that refused it."""
        self._requests.labels(outcome).inc()
        self._request_s.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)
        self._cached_tokens.inc(cached_tokens)
        self._generation_tokens.inc(generation_tokens)
        self._images.inc(num_images)

    def render(self, load: EngineLoad | None = None) -> tuple[bytes, str]:
        """The page a Prometheus server scrapes, and its content type. `load` refreshes the gauges first."""
        if load is not None:
            self.set_load(load)
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _counter(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"streamserve_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"streamserve_{name}", help, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"streamserve_{name}", help, buckets=buckets, registry=self.registry)
