"""What /metrics says."""

from prometheus_client.parser import text_string_to_metric_families

from streamserve.messages import EngineLoad
from streamserve.metrics import Metrics


def _values(metrics: Metrics, load: EngineLoad | None = None) -> dict[str, float]:
    body, content_type = metrics.render(load)
    assert content_type.startswith("text/plain")
    return {
        sample.name + "".join(f"{{{value}}}" for key, value in sample.labels.items() if key == "outcome"): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_requests_are_counted_by_outcome_with_their_tokens() -> None:
    metrics = Metrics()
    metrics.request_finished("stop", seconds=1.0, prompt_tokens=10, cached_tokens=4, generation_tokens=7)
    metrics.request_finished("stop", seconds=1.0, prompt_tokens=5, generation_tokens=3)
    metrics.request_finished("queue_full", seconds=0.0)
    values = _values(metrics)
    assert values["streamserve_num_requests_total{stop}"] == 2
    assert values["streamserve_num_requests_total{queue_full}"] == 1
    assert values["streamserve_prompt_tokens_total"] == 15
    assert values["streamserve_cached_tokens_total"] == 4
    assert values["streamserve_generation_tokens_total"] == 10
    assert values["streamserve_e2e_request_latency_seconds_count"] == 3


def test_usage_counts_held_pages_but_not_free_or_evictable_ones() -> None:
    load = EngineLoad(running=2, waiting=3, free_tokens=50, evictable_tokens=30, total_tokens=100)
    values = _values(Metrics(), load)
    assert values["streamserve_token_usage"] == 0.2
    assert (values["streamserve_num_running_reqs"], values["streamserve_num_queue_reqs"]) == (2, 3)


def test_a_merged_delta_counts_as_its_tokens_mean() -> None:
    metrics = Metrics()
    metrics.next_tokens(4, 0.4)
    assert abs(_values(metrics)["streamserve_inter_token_latency_seconds_sum"] - 0.1) < 1e-9


def test_steps_report_time_tokens_and_load() -> None:
    metrics = Metrics()
    metrics.step_finished(seconds=0.01, num_rows=3, num_tokens=20, load=EngineLoad(running=3))
    metrics.request_preempted()
    values = _values(metrics)
    assert (values["streamserve_step_seconds_count"], values["streamserve_step_tokens_total"]) == (1, 20)
    assert (values["streamserve_num_running_reqs"], values["streamserve_num_preemptions_total"]) == (3, 1)


def test_guesses_and_the_right_ones_of_them_are_counted() -> None:
    metrics = Metrics()
    metrics.tokens_drafted(12, 5)
    metrics.tokens_drafted(4, 0)
    values = _values(metrics)
    assert (values["streamserve_drafted_tokens_total"], values["streamserve_accepted_tokens_total"]) == (16, 5)
    assert metrics.drafts == (16, 5)


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.request_preempted()
    assert _values(second)["streamserve_num_preemptions_total"] == 0
