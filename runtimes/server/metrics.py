"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from arriero.runtimes.generation import Generation
from arriero.runtimes.server.bundles import Bundles

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
PER_TOKEN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Metrics:
    """The counters of one server."""

    def __init__(self, bundles: Bundles) -> None:
        """Count requests here, and read the engines of `bundles` when they are asked for."""
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(bundles))
        self._requests = Counter("arriero_requests", "HTTP requests.", ("path", "status"), registry=self._registry)
        self._seconds = Histogram(
            "arriero_request_seconds", "Time to answer a request.", ("path",), buckets=SECONDS, registry=self._registry
        )
        self._first = Histogram(
            "arriero_ttft_seconds", "Time to first token.", buckets=SECONDS, registry=self._registry
        )
        self._token = Histogram(
            "arriero_token_seconds", "Mean time between an answer's tokens.", buckets=PER_TOKEN, registry=self._registry
        )

    def requested(self, path: str, status: int, seconds: float) -> None:
        """A request to `path` was answered with `status`."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def answered(self, generation: Generation) -> None:
        """An answer is complete."""
        if generation.token_ids:
            self._first.observe(generation.ttft_s)
        if (seconds := generation.token_s) is not None:
            self._token.observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """What the engines count, by bundle, and which bundles are open."""

    def __init__(self, bundles: Bundles) -> None:
        self._bundles = bundles

    def collect(self) -> Iterator[Metric]:
        bundles = self._bundles.by_name
        stats = {name: bundle.stats() for name, bundle in bundles.items()}
        for field, words in (
            ("prefilled_tokens", "Tokens of prompts that were read."),
            ("reused_tokens", "Tokens of prompts that had been read before."),
            ("generated_tokens", "Tokens chosen."),
            ("drafted_tokens", "Tokens that were drafted to be checked in one step."),
            ("accepted_tokens", "Drafted tokens that were chosen."),
            ("failed_drafts", "Errors of the draft model; the answers went on without it."),
            ("steps", "Decode steps."),
        ):
            counter = CounterMetricFamily(f"arriero_{field}", words, labels=("bundle",))
            for name, of_engine in stats.items():
                counter.add_metric((name,), getattr(of_engine, field))
            yield counter
        for field, words in (("running", "Answers on their way."), ("waiting", "Requests that wait for room.")):
            gauge = GaugeMetricFamily(f"arriero_{field}", words, labels=("bundle",))
            for name, of_engine in stats.items():
                gauge.add_metric((name,), getattr(of_engine, field))
            yield gauge
        opened = CounterMetricFamily("arriero_bundle_opened", "Times that a bundle was opened.", labels=("bundle",))
        is_open = GaugeMetricFamily("arriero_bundle_open", "Whether a bundle is open.", labels=("bundle",))
        size = GaugeMetricFamily("arriero_bundle_bytes", "Memory that an open bundle takes.", labels=("bundle",))
        for name, bundle in bundles.items():
            opened.add_metric((name,), bundle.opened)
            is_open.add_metric((name,), bundle.session is not None)
            size.add_metric((name,), bundle.nbytes)
        yield from (opened, is_open, size)
        if self._bundles.budget is not None:
            yield GaugeMetricFamily(
                "arriero_memory_bytes", "Memory that open bundles may take together.", self._bundles.budget
            )
