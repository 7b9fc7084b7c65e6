"""What a scrape says after some requests and some load frames."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import metric_names
from cluster.errors import ApiError, InvalidRequest
from cluster.flight import Flight, Timing
from cluster.metric_names import WORKER_GAUGES
from cluster.metrics import CONTENT_TYPE_LATEST, Metrics
from workers.messages import Load
from workers.request import SamplingParams


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics(clock)


def flight(clock: Clock, request_id: str = "r1") -> Flight:
    timing = Timing(
        admitted_at=clock.now, queue=0.1, prefill=0.2, first_token=0.45, landed=0.5, second_token=0.625
    )
    prompt = [1] * 200
    result = Flight(
        id=request_id, prompt=prompt, sampling=SamplingParams(max_tokens=9), namespace=b"", page_hashes=[]
    )
    result.timing, result.num_hit = timing, 128
    return result


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    """(name, label values) -> value, without the time stamps of creation."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (
            sample.name.removeprefix("lightship_"),
            "/".join(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_a_request_from_admission_to_its_end(metrics: Metrics, clock: Clock) -> None:
    request = flight(clock)
    metrics.started()
    assert samples(metrics)["requests_in_progress", ""] == 1
    for at, num_tokens in ((100.5, 1), (100.6, 0), (100.8, 3)):
        clock.now = at
        metrics.tokens(request, num_tokens)
    clock.now = 102.0
    request.restarts = 2
    metrics.ended(request, "stop", tenant="acme", nanodollars=1234)
    seen = samples(metrics)
    assert seen["requests_in_progress", ""] == 0
    assert seen["time_to_first_token_seconds_sum", ""] == pytest.approx(0.5)
    assert seen["time_to_first_token_seconds_count", ""] == 1
    assert seen["inter_token_latency_seconds_sum", ""] == pytest.approx(0.3)
    assert seen["inter_token_latency_seconds_count", ""] == 3
    assert seen["e2e_request_latency_seconds_sum", ""] == pytest.approx(2.0)
    assert seen["request_queue_time_seconds_sum", ""] == pytest.approx(0.1)
    assert seen["request_prefill_time_seconds_sum", ""] == pytest.approx(0.2)
    assert seen["request_gateway_time_seconds_sum", ""] == pytest.approx(0.5 - 0.1 - 0.2)
    assert seen["request_ship_time_seconds_sum", ""] == pytest.approx(0.05)
    assert seen["request_first_decode_time_seconds_sum", ""] == pytest.approx(0.125)
    assert seen["request_decode_time_seconds_sum", ""] == pytest.approx(0.3)
    assert seen["request_time_per_output_token_seconds_sum", ""] == pytest.approx(0.1)
    assert seen["request_prompt_tokens_sum", ""] == 200
    assert seen["request_generation_tokens_sum", ""] == 4
    assert seen["prompt_tokens_total", ""] == seen["prefix_cache_queries_total", ""] == 200
    assert seen["prefix_cache_hits_total", ""] == 128
    assert seen["generation_tokens_total", ""] == 4
    assert seen["request_success_total", "stop"] == 1
    assert seen["requests_resumed_total", ""] == 2
    assert seen["billed_nanodollars_total", "acme"] == 1234
    assert seen["requests_failed_total", ""] == 0


def test_a_request_without_a_token_says_nothing_of_times_and_caches(metrics: Metrics, clock: Clock) -> None:
    metrics.started()
    metrics.ended(flight(clock), "error", tenant="acme", nanodollars=0)
    seen = samples(metrics)
    assert seen["requests_failed_total", ""] == 1
    assert seen["request_queue_time_seconds_count", ""] == 0
    assert seen["prompt_tokens_total", ""] == 0
    assert ("request_success_total", "error") not in seen


def test_an_id_that_comes_again_begins_anew(metrics: Metrics, clock: Clock) -> None:
    for _ in range(2):
        metrics.started()
        metrics.tokens(flight(clock), 1)
        metrics.ended(flight(clock), "length", tenant="acme", nanodollars=0)
        clock.now += 50
    assert samples(metrics)["time_to_first_token_seconds_count", ""] == 2
    assert samples(metrics)["inter_token_latency_seconds_count", ""] == 0


def test_rejections_by_what_went_wrong(metrics: Metrics) -> None:
    for error in (InvalidRequest("no"), InvalidRequest("no"), ApiError("fault")):
        metrics.rejected(error)
    seen = samples(metrics)
    assert seen["requests_rejected_total", "InvalidRequest"] == 2
    assert seen["requests_rejected_total", "ApiError"] == 1


def test_the_last_load_frame_of_each_worker(metrics: Metrics) -> None:
    metrics.observe_load("p1", "prefill", Load(running=9))
    load = Load(
        running=3,
        waiting=2,
        free_pages=50,
        cached_pages=30,
        held_pages=20,
        peers=[("d1", 7)],
        draining=True,
        counters={"shipped_bytes": 4096.0, "of_another_version": 1.0},
    )
    metrics.observe_load("p1", "prefill", load)
    metrics.observe_load("d1", "decode", Load())
    seen = samples(metrics)
    assert seen["num_requests_running", "prefill/p1"] == 3
    assert seen["num_requests_waiting", "prefill/p1"] == 2
    assert seen["kv_cache_usage_perc", "prefill/p1"] == pytest.approx(0.2)
    assert seen["kv_cache_usage_perc", "decode/d1"] == 0
    assert seen["pairs_alive", "prefill/p1"] == 1
    assert (seen["draining", "prefill/p1"], seen["draining", "decode/d1"]) == (1, 0)
    assert seen["shipped_bytes_total", "prefill/p1"] == 4096
    assert ("shipped_bytes_total", "decode/d1") not in seen
    assert not any("another_version" in name for name, _ in seen)
    metrics.forget("p1")
    metrics.forget("unknown")
    gauges = {gauge.name for gauge in WORKER_GAUGES}
    assert {labels for name, labels in samples(metrics) if name in gauges} == {"decode/d1"}


def test_all_names_are_there_from_the_start_and_have_a_text(metrics: Metrics) -> None:
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    for metric in metric_names.ALL:
        family = families.pop(metric_names.PREFIX + metric.name)
        assert (family.type, family.documentation) == (metric.kind, metric.text)
    others = [name for name in families if not name.endswith("_created")]
    assert not others, "every metric is in the one file"
    assert CONTENT_TYPE_LATEST.startswith("text/plain")


def test_series_whose_labels_are_known_begin_at_zero(metrics: Metrics) -> None:
    seen = samples(metrics)
    for reason in ("RateLimited", "Overloaded", "LedgerAway", "InvalidRequest", "ApiError"):
        assert seen["requests_rejected_total", reason] == 0
    assert seen["request_success_total", "cancelled"] == 0


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [metric.exported for metric in metric_names.ALL]
    assert len(set(names)) == len(names)
    for metric in metric_names.ALL:
        if metric.kind == "histogram":
            assert metric.name.endswith(f"_{metric.unit}")
            assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric_names.TIME_TO_FIRST_TOKEN.buckets[-1] >= 600  # 128k tokens on a CPU
    assert metric_names.REQUEST_PROMPT.buckets[-1] == 128 * 1024


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert metric_names.table() in text, (
        "python -m cluster.metric_names prints what docs/metrics.md must hold"
    )


def test_a_token_that_nothing_followed_has_neither_shipping_nor_decoding(
    metrics: Metrics, clock: Clock
) -> None:
    request = flight(clock)
    request.timing.landed = request.timing.second_token = None
    metrics.started()
    metrics.tokens(request, 1)
    metrics.ended(request, "length", tenant="acme", nanodollars=1)
    seen = samples(metrics)
    assert seen["time_to_first_token_seconds_count", ""] == 1
    for name in ("ship", "first_decode", "decode"):
        assert seen[f"request_{name}_time_seconds_count", ""] == 0
    assert seen["request_time_per_output_token_seconds_count", ""] == 0


def test_caches_that_landed_before_the_first_token_came_took_no_time_to_ship() -> None:
    timing = Timing(first_token=0.5, landed=0.4, second_token=0.6)
    assert timing.ship == 0
    assert timing.first_decode == pytest.approx(0.1)


def test_what_is_so_just_now(metrics: Metrics) -> None:
    metrics.observe_gateway(ready=True, linked=4, routable=3, queued_tokens=77, unsettled=2)
    seen = samples(metrics)
    assert (seen["ready", ""], seen["pairs_linked", ""], seen["pairs_routable", ""]) == (1, 4, 3)
    assert (seen["queued_prompt_tokens", ""], seen["unsettled_requests", ""]) == (77, 2)


def test_two_gateways_in_one_process_count_apart(metrics: Metrics, clock: Clock) -> None:
    other = Metrics(clock)
    metrics.started()
    assert samples(other)["requests_in_progress", ""] == 0
