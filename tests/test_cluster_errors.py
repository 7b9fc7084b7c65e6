import json
import re

import pytest

from cluster import errors
from cluster.errors import ApiError

EXAMPLES: list[tuple[ApiError, int, str | None, dict[str, str]]] = [
    (errors.ApiError("x"), 500, None, {}),
    (errors.InvalidRequest("x", param="top_p"), 400, None, {}),
    (errors.ContextTooLong("x"), 400, "context_length_exceeded", {}),
    (errors.Unauthorized("x"), 401, "invalid_api_key", {"www-authenticate": "Bearer"}),
    (errors.UnknownModel("gpt"), 404, "model_not_found", {}),
    (errors.UnknownPath("/v2"), 404, "unknown_url", {}),
    (errors.MethodNotAllowed("/v1/models", allowed="GET"), 405, "method_not_supported", {"allow": "GET"}),
    (errors.TooLarge(max_bytes=10), 413, "request_too_large", {}),
    (errors.UnsupportedMedia("text/html"), 415, "unsupported_media_type", {}),
    (errors.RateLimited("x", retry_after_s=7), 429, "rate_limit_exceeded", {"retry-after": "7"}),
    (errors.Overloaded("x", retry_after_s=2), 503, "overloaded", {"retry-after": "2"}),
    (errors.WorkersLost("x"), 503, "workers_lost", {"retry-after": "1"}),
    (errors.LedgerAway("x"), 503, "ledger_unavailable", {"retry-after": "1"}),
]


@pytest.mark.parametrize(("error", "status", "code", "headers"), EXAMPLES, ids=lambda v: type(v).__name__)
def test_each_error_has_its_status_and_an_openai_body(
    error: ApiError, status: int, code: str | None, headers: dict[str, str]
) -> None:
    body = json.loads(error.body())
    assert error.status == status
    assert error.headers == headers
    assert body == {"error": {"message": str(error), "type": error.type, "param": error.param, "code": code}}


def test_every_error_is_drawn_in_the_docstring_with_its_status() -> None:
    drawn = re.findall(r"^[ |+-]*(\w+) +(\d{3})\b", errors.__doc__ or "", re.MULTILINE)
    classes = {
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ApiError)
    }
    assert sorted(drawn) == sorted((kind.__name__, str(kind.status)) for kind in classes)


def test_a_client_s_own_text_is_cut() -> None:
    assert len(errors.UnknownModel("m" * 10**6).message) < 200
    assert len(errors.UnknownPath("/" * 10**6).message) < 200
