"""JSON bodies, strictly read. Whatever is wrong, the error is an InvalidRequest that names the field and the limit."""

from typing import Any, TypeVar

import msgspec

from cluster.errors import InvalidRequest

T = TypeVar("T")

PARAM_CHARS, MESSAGE_CHARS = 100, 300  # an error repeats no more of what a client wrote


def decode(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is not valid JSON: it is nested too deeply") from None
    except msgspec.DecodeError as error:
        sentence = str(error).removeprefix("JSON is malformed: ")
        raise InvalidRequest(f"the body is not valid JSON: {sentence}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    return value


def pick(
    raw: dict[str, Any],
    struct: type[msgspec.Struct],
    neutral: dict[str, tuple[Any, ...]],
    ignored: frozenset[str],
    prefix: str = "",
) -> dict[str, Any]:
    """The fields of `struct` that are set. Refuses by name what would have to have an effect but cannot."""
    fields = {}
    for name, value in raw.items():
        if name in struct.__struct_fields__:
            if value is not None:
                fields[name] = value
        elif name in neutral:
            if value is not None and not any(_same(value, allowed) for allowed in neutral[name]):
                only = " or ".join(msgspec.json.encode(allowed).decode() for allowed in neutral[name])
                raise invalid(
                    prefix + name, f"is not supported other than {only}" if only else "is not supported"
                )
        elif name not in ignored:
            raise invalid(prefix + name, "is not a field that is known here")
    return fields


def _same(value: Any, allowed: Any) -> bool:
    return type(value) is type(allowed) and value == allowed  # True == 1


def convert(fields: dict[str, Any], to: type[T]) -> T:
    try:
        return msgspec.convert(fields, to)
    except msgspec.ValidationError as error:
        sentence, _, where = str(error).partition(" - at ")
    path = where.strip("`").removeprefix("key` in `").removeprefix("$").removeprefix(".")
    sentence, missing, name = sentence.partition("Object missing required field ")
    if missing:
        path, sentence = ".".join(filter(None, [path, name.strip("`")])), "is required"
    raise invalid(path, sentence.replace(" | null", ""))


def invalid(param: str, sentence: str) -> InvalidRequest:
    param = param[:PARAM_CHARS]
    return InvalidRequest(f"{param}: {sentence}"[:MESSAGE_CHARS], param=param)
