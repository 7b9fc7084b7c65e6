"""What can go wrong with a request, and which HTTP status and OpenAI-shaped body it gets. Knows nothing of handlers.

ApiError                  500  a fault of the service
  +-- InvalidRequest      400  the sentence and `param` name the field
  |     +-- ContextTooLong     400  prompt and answer do not fit into the context
  +-- Unauthorized        401  no API key, or an unknown one
  +-- UnknownModel        404
  +-- UnknownPath         404
  +-- MethodNotAllowed    405
  +-- TooLarge            413  the body is larger than the gateway reads
  +-- UnsupportedMedia    415  the body is not JSON
  +-- RateLimited         429  the tenant's limits, or its share of the gateway's room, are used up
  +-- Unavailable         503  trying again later may succeed
        +-- Overloaded         503  no worker can take it now, or the gateway is full
        +-- WorkersLost        503  workers were lost more often than a request is started again
        +-- LedgerAway         503  nothing is served unbilled
  +-- DeadlineExceeded    504  the request's own time is up
"""

from typing import Any

import msgspec

ECHO_CHARS = 80  # how much of a client's own text an error repeats


def echo(text: str) -> str:
    """A client's text in quotes, cut to a length fit for an error message."""
    return repr(text if len(text) <= ECHO_CHARS else text[:ECHO_CHARS] + "...")


class ApiError(Exception):
    """A request ends with this status. The message is for the client: it must not tell of the service's inside."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status, lower case."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}

    def as_object(self) -> dict[str, Any]:
        """The body OpenAI's clients expect."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def body(self) -> bytes:
        """`as_object` as JSON."""
        return msgspec.json.encode(self.as_object())


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(ApiError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class UnknownModel(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"the model {echo(model)} does not exist here; see /v1/models", param="model")


class UnknownPath(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_url"

    def __init__(self, path: str) -> None:
        super().__init__(f"there is nothing at {echo(path)}")


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_supported"

    def __init__(self, path: str, *, allowed: str) -> None:
        super().__init__(f"{path} takes {allowed} only")
        self._allowed = allowed

    @property
    def headers(self) -> dict[str, str]:
        return {"allow": self._allowed}


class TooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"

    def __init__(self, *, max_bytes: int) -> None:
        super().__init__(f"the body is larger than {max_bytes} bytes")


class UnsupportedMedia(ApiError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"

    def __init__(self, content_type: str) -> None:
        super().__init__(f"the content type must be application/json, not {echo(content_type)}")


class RateLimited(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: int | None = 1) -> None:
        """retry_after_s None: waiting does not help."""
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        # OpenAI's clients try a 429 again unless they are told not to.
        return {"x-should-retry": "false"} if self.retry_after_s is None else super().headers


class Unavailable(ApiError):
    status = 503
    type = "service_unavailable_error"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    code = "overloaded"


class WorkersLost(Unavailable):
    code = "workers_lost"


class LedgerAway(Unavailable):
    code = "ledger_unavailable"


class DeadlineExceeded(ApiError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
