"""A running server keeps what its /openapi.json says: made-up requests, right and wrong, get documented answers and no 5xx.

STREAMSERVE_OPENAPI_CASES sets how many requests are made up, STREAMSERVE_OPENAPI_SEED which; the suite's own number is small.
"""

import os
import re
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from anyio import to_thread
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from schemathesis import GenerationMode
from schemathesis.checks import (
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.schemas import APIOperation

from streamserve.config import ServerConfig
from tests.e2e.serving import fake_server

pytestmark = pytest.mark.anyio
CASES = int(os.environ.get("STREAMSERVE_OPENAPI_CASES", "120"))
SEED = int(os.environ.get("STREAMSERVE_OPENAPI_SEED", "5"))
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
WAIT_S = 20
HI = [{"role": "user", "content": "x"}]
# Half of the right requests get these, and few other fields: made up, they would rarely suit each other.
MOST_FIELDS = 3
FITTING: dict[str, dict[str, Any]] = {
    "ChatRequest": {"messages": HI},
    "CompletionRequest": {"prompt": "x"},
    "MessagesRequest": {"model": "tiny", "messages": HI, "max_tokens": 8},
    "CountTokensRequest": {"model": "tiny", "messages": HI},
    "NativeRequest": {"text": "x", "input_ids": None},
    "CreateResponse": {"input": "x", "previous_response_id": None},
    "CountInputTokens": {"input": "x", "previous_response_id": None},
    "TokenizeRequest": {"prompt": "x", "messages": None},
    "LookupRequest": {"messages": HI, "prompt": None},
    "DetokenizeRequest": {"tokens": [1, 2]},
}


async def test_made_up_requests_get_the_answers_that_the_document_promises() -> None:
    # A short context and answers of eight tokens: what is asked for is bounded, whatever it is.
    async with fake_server(step_s=0.0, num_pages=33, answer_len=8) as server:
        async with httpx.AsyncClient(base_url=server.url) as http:
            document = (await http.get("/openapi.json")).json()
        statuses, wrong = await to_thread.run_sync(_try_all, document, server.url)
        await server.until_idle()
    assert not wrong, "\n\n".join(wrong)
    assert statuses.total() >= CASES * 0.8
    assert statuses[200] >= statuses.total() * 0.1 and statuses[400] > 0, statuses


async def test_the_documents_own_examples_work_plain_and_streamed() -> None:
    async with fake_server(step_s=0.0, answer_len=8) as server, httpx.AsyncClient(base_url=server.url) as http:
        document = (await http.get("/openapi.json")).json()
        tried = 0
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
                if "example" not in content:
                    continue
                plain = await http.request(method, path, json=content["example"])
                if "--embedding-model" in plain.text:  # there is none here
                    continue
                tried += 1
                assert plain.status_code == 200, (path, plain.text)
                answers = operation["responses"]["200"]["content"]
                assert plain.headers["content-type"].split(";")[0] in answers
                if "text/event-stream" in answers:
                    stream = await http.request(method, path, json={**content["example"], "stream": True})
                    assert stream.headers["content-type"].split(";")[0] == "text/event-stream", (path, stream.text)
        assert tried >= 6


async def test_the_document_and_its_page_need_no_key_and_load_nothing_from_elsewhere() -> None:
    async with fake_server(ServerConfig(api_key=("k",))) as server, httpx.AsyncClient(base_url=server.url) as http:
        document = (await http.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        assert document["paths"]["/v1/chat/completions"]["post"]["security"] == [{"bearer": []}, {"x-api-key": []}]
        assert document["paths"]["/health"]["get"]["security"] == []
        page = await http.get("/docs")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert sources and not [source for source in sources if "//" in source]
        for source in sources:
            assert (await http.get(f"/{source}")).status_code == 200, source


def _try_all(document: dict[str, Any], url: str) -> tuple[Counter[int], list[str]]:
    """Runs in a worker thread. How often each status came, and what was wrong with answers."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in schema.get_all_operations()]
    varied = [operation for operation in operations if operation.body or operation.query]
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    for operation in operations:
        if operation in varied:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _try_one(operation, mode, max(1, -(-CASES // (2 * len(varied)))), url, statuses, wrong)
        else:  # nothing of it can be wrong, and one request is like another
            _try_one(operation, GenerationMode.POSITIVE, 1, url, statuses, wrong)
    return statuses, wrong


def _try_one(
    operation: APIOperation, mode: GenerationMode, num_cases: int, url: str, statuses: Counter[int], wrong: list[str]
) -> None:
    kind = _body_of(operation)

    @seeded(SEED)
    @settings(
        max_examples=num_cases,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        body = case.body
        if isinstance(body, dict) and isinstance(body.get("model"), str):
            body["model"] = "tiny"  # no made-up name would ever be the right one
        if isinstance(body, dict) and isinstance(body.get("timeout"), float) and body["timeout"] < WAIT_S:
            body["timeout"] = WAIT_S  # a deadline that passes is a 504, as it should be
        if isinstance(body, dict) and mode is GenerationMode.POSITIVE and statuses.total() % 2:
            for name in sorted(body)[MOST_FIELDS:]:
                del body[name]
            body |= FITTING.get(kind, {})
        response = case.call(base_url=url, timeout=WAIT_S)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    try:
        send()
    except (Exception, BaseExceptionGroup) as failure:
        wrong.append(f"{operation.label} ({mode.value}): {failure}")


def _body_of(operation: APIOperation) -> str:
    """The name of the body's type."""
    content = operation.definition.raw.get("requestBody", {}).get("content", {})
    reference: str = content.get("application/json", {}).get("schema", {}).get("$ref", "")
    return reference.rsplit("/", 1)[-1]
