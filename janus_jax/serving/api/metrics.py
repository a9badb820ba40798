"""Figures for Prometheus: requests, tokens, times; the names follow vLLM's, whose dashboards are widespread."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from janus_jax.serving.engine import Engine
from janus_jax.serving.jobs import Job

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class Metrics:
    """The server's figures; those that the engine counts itself are read when they are asked for."""

    def __init__(self, engine: Engine):
        self._engine, self._registry = engine, CollectorRegistry()
        here = {"registry": self._registry}
        self._requests = Counter("janus_requests", "HTTP requests by route and status", ("route", "status"), **here)
        self._first = Histogram(
            "janus_time_to_first_token_seconds", "From submission to a job's first token", buckets=_FIRST, **here
        )
        self._queue = Histogram("janus_request_queue_time_seconds", "Waiting for rows", buckets=_WHOLE, **here)
        self._whole = Histogram("janus_e2e_request_latency_seconds", "A job's whole time", buckets=_WHOLE, **here)
        self._registry.register(self)
        self.typical_seconds = 1.0  # of a job, lately

    def collect(self):
        counts = self._engine.counts
        yield GaugeMetricFamily("janus_num_requests_running", "Jobs that have rows", self._engine.running)
        yield GaugeMetricFamily("janus_num_requests_waiting", "Jobs that wait for rows", self._engine.waiting)
        for name, about, value in (
            ("prompt_tokens", "Tokens of prompts", counts.prompt_tokens),
            ("prefix_cache_hits", "Tokens of prompts that the cache held", counts.reused_tokens),
            ("generation_tokens", "Tokens drawn, codes of images among them", counts.drawn_tokens),
            ("engine_steps", "Steps of the model", counts.steps),
        ):
            yield CounterMetricFamily(f"janus_{name}", about, value)
        ended = CounterMetricFamily("janus_jobs", "Jobs that ended, by reason", labels=["reason"])
        for reason, count in sorted(counts.ended.items()):
            ended.add_metric([reason], count)
        yield ended

    def note_request(self, route: str, status: int):
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    def note_job(self, job: Job):
        """A job is over."""
        whole = (job.ended or time.monotonic()) - job.submitted
        self.typical_seconds += 0.1 * (whole - self.typical_seconds)
        self._whole.observe(whole)
        if job.seated is not None:
            self._queue.observe(job.seated - job.submitted)
        if job.first is not None:
            self._first.observe(job.first - job.submitted)

    @property
    def wait_seconds(self) -> float:
        """About when a job of those that wait will have been seated."""
        return self.typical_seconds * self._engine.waiting / max(self._engine.running, 1)

    def text(self) -> bytes:
        return generate_latest(self._registry)
