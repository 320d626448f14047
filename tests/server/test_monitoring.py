"""`/`, `/health`, `/version`, `/metrics`, `/v1/models` and the API's documentation."""

from __future__ import annotations

import re
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import make_llm
from tests.server.live_server import LiveServer, live_server
from tests.support.documents import table_rows
from tests.support.source_tree import ROOT
from tokenmill import __version__


def scrape(server: LiveServer) -> dict[tuple[str, str], float]:
    """All samples by name and by the label that tells them apart besides the model's name."""
    samples = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            samples[sample.name, ",".join(labels.values())] = sample.value
    return samples


def test_the_page_for_operators_names_every_metric(server: LiveServer) -> None:
    types = re.findall(r"^# TYPE tokenmill:(\w+) ", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    exported = {name for name in types if not name.endswith("_created")}
    page = (ROOT / "docs/operating.md").read_text(encoding="utf-8").partition("## Metrics")[2].partition("\n## ")[0]
    rows = [row[0] for row in table_rows(page, 2)]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == exported


@pytest.mark.spec("G3")
def test_metrics_move_by_what_was_done(server: LiveServer, client: openai.OpenAI) -> None:
    server.wait_until_idle()
    before = scrape(server)
    prompt = "metrics should count this prompt, which nobody has sent before"
    usages = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=10, extra_body={"ignore_eos": True}).usage
        for _ in range(2)
    ]
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 0}  # a token a step: greedy ones may come in groups
    stream: Any = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=200, stream=True, extra_body={"ignore_eos": True}, **drawn
    )
    list(stream)
    server.wait_until_idle()
    after = scrape(server)

    def moved(name: str, label: str = "") -> float:
        return after[f"tokenmill:{name}", label] - before[f"tokenmill:{name}", label]

    assert all(usage is not None for usage in usages)
    prompt_tokens = usages[0].prompt_tokens
    cached = usages[1].prompt_tokens_details.cached_tokens
    assert cached > 0
    assert moved("generation_tokens_total") == 220
    assert moved("prefix_cache_queries_total") == 3 * prompt_tokens
    assert moved("prompt_tokens_total") + moved("prefix_cache_hits_total") == 3 * prompt_tokens
    assert moved("prefix_cache_hits_total") >= 2 * cached
    assert moved("request_success_total", "length") == 3
    assert moved("request_success_total", "stop") == 0
    assert moved("request_failure_total", "cancelled") == 0
    assert moved("time_to_first_token_seconds_count") == 3
    assert moved("e2e_request_latency_seconds_count") == 3
    assert moved("request_queue_time_seconds_count") == 3
    assert moved("request_time_per_output_token_seconds_count") == 3
    assert moved("request_prompt_tokens_sum") == 3 * prompt_tokens
    assert moved("request_generation_tokens_sum") == 220
    assert 1 <= moved("inter_token_latency_seconds_count") <= 199, (
        "one stream of 200 tokens; slow readers get several at once"
    )
    assert 0 < moved("time_to_first_token_seconds_sum") < moved("e2e_request_latency_seconds_sum")
    assert after["tokenmill:num_requests_running", ""] == 0
    assert after["tokenmill:num_requests_waiting", ""] == 0
    assert after["tokenmill:kv_cache_usage_perc", ""] == 0
    assert after["tokenmill:engine_healthy", ""] == 1


def test_scraping_changes_nothing(server: LiveServer) -> None:
    server.wait_until_idle()
    first, second = scrape(server), scrape(server)
    ours = [key for key in first if key[0].startswith("tokenmill:") and not key[0].endswith("_age_seconds")]
    assert ours
    assert {key: first[key] for key in ours} == {key: second[key] for key in ours}


def test_metrics_show_a_running_request(server: LiveServer, client: openai.OpenAI) -> None:
    stream: Any = client.completions.create(
        model="tiny", prompt="a", n=3, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    during = scrape(server)
    stream.close()
    server.wait_until_idle()
    assert during["tokenmill:num_requests_running", ""] == 3
    assert 0 < during["tokenmill:kv_cache_usage_perc", ""] < 1
    assert scrape(server)["tokenmill:request_failure_total", "cancelled"] >= 1


def test_metrics_are_labelled_with_the_model(server: LiveServer) -> None:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    ours = [family for family in families if family.name.startswith("tokenmill:")]
    assert {sample.labels["model_name"] for family in ours for sample in family.samples} == {"tiny"}
    assert all(family.documentation for family in ours)


def test_two_servers_in_one_process_count_for_themselves(server: LiveServer) -> None:
    with live_server(server.llm, served_model_name="other") as other, other.client() as client:
        before = scrape(server)
        client.completions.create(model="other", prompt="a", max_tokens=2)
        key = ("tokenmill:e2e_request_latency_seconds_count", "")
        assert scrape(other)[key] == 1
        assert scrape(server)[key] == before[key]


def test_openmetrics_is_spoken_if_asked_for(server: LiveServer) -> None:
    response = httpx.get(f"{server.url}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


@pytest.mark.spec("A6")
def test_health(server: LiveServer) -> None:
    server.wait_until_idle()
    response = httpx.get(f"{server.url}/health")
    assert response.status_code == 200
    report = response.json()
    assert report["status"] == "healthy"
    [engine] = report["processes"]
    assert (engine["name"], engine["state"], engine["has_work"], engine["progress_age"]) == (
        "engine",
        "ready",
        False,
        None,
    )
    assert engine["last_step_age"] >= 0


def test_health_after_shutdown(model_dir: Any) -> None:
    with make_llm(model_dir) as llm, live_server(llm) as server, server.client() as client:
        llm.shutdown()
        response = httpx.get(f"{server.url}/health")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "executor_shutdown"
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=llm.model_name, prompt="a")
        assert caught.value.status_code == 503


def test_version(server: LiveServer) -> None:
    assert httpx.get(f"{server.url}/version").json() == {"version": __version__}


def test_root_says_what_this_is(server: LiveServer) -> None:
    page = httpx.get(f"{server.url}/").json()
    assert (page["name"], page["model"], page["version"]) == ("tokenmill", "tiny", __version__)
    assert page["endpoints"]["/v1/chat/completions"] == ["POST"]
    assert {"/v1/completions", "/v1/models", "/health", "/metrics"} <= set(page["endpoints"])


def test_documentation_describes_requests_and_answers(server: LiveServer) -> None:
    assert httpx.get(f"{server.url}/docs").status_code == 200
    description = httpx.get(f"{server.url}/openapi.json").json()
    operation = description["paths"]["/v1/chat/completions"]["post"]
    assert set(operation["responses"]) >= {"200", "400", "404", "429", "503"}
    fields = description["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert fields["messages"]["description"]
    assert "ChatCompletion" in description["components"]["schemas"]


def test_models(server: LiveServer, client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "tokenmill")
    assert model.max_model_len == server.llm.max_seq_len
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_model_is_named_as_the_user_named_it(server: LiveServer) -> None:
    """Names with slashes, such as paths and hub ids, can be looked up."""
    with live_server(server.llm) as unnamed, unnamed.client() as client:
        [model] = client.models.list().data
        assert model.id == server.llm.model_name
        assert "/" in model.id
        assert client.get(f"/models/{model.id}", cast_to=object)["id"] == model.id


@pytest.mark.spec("G3")
def test_requests_are_counted_by_outcome(own_server: LiveServer) -> None:
    with own_server.client() as client:
        client.completions.create(model="tiny", prompt="a", max_tokens=1)
    httpx.post(f"{own_server.url}/v1/completions", json={})
    httpx.get(f"{own_server.url}/no/such/thing")
    httpx.request("BREW", f"{own_server.url}/health")
    with pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True}
        httpx.post(f"{own_server.url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.1))
    own_server.wait_until_idle()
    found = {
        label: value for (name, label), value in scrape(own_server).items() if name.endswith("http_requests_total")
    }
    assert found == {
        "POST,/v1/completions,200": 1,
        "POST,/v1/completions,400": 1,
        "POST,/v1/completions,499": 1,
        "GET,other,404": 1,
        "other,/health,405": 1,
    }
