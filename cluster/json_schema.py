"""What of JSON schema an answer can be held to, and whether a schema can be met at all. Knows nothing of grammars.

A keyword that would be ignored in silence is refused by name. What the grammar library finds wrong with the rest, such as a
range without numbers, it says itself.
"""

import copy
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NoReturn

import msgspec

from cluster import dates
from cluster.errors import InvalidRequest, echo

MAX_BYTES = 64 * 2**10
MAX_DEPTH = 64  # objects and arrays within each other, as the schema is written
MAX_REFERENCES = 256  # different ones
MAX_NAME_PATTERNS = 64  # each is compared with each
MAX_MULTIPLE = 1000  # what all multipleOf divide, without zeros at its end: an automaton has so many states
MAX_SENTENCE_CHARS = 300

Path = tuple[str, ...]

_ANNOTATIONS = """title description default example examples deprecated readOnly writeOnly $comment $schema $id $anchor
contentEncoding contentMediaType discriminator"""
DEFINITIONS = ("$defs", "definitions")
_BY_NAME = ("properties", "patternProperties", *DEFINITIONS)
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")
_VALUES = """$ref const enum type required minItems maxItems minProperties maxProperties minLength maxLength pattern format
minimum maximum exclusiveMinimum exclusiveMaximum multipleOf"""
ANNOTATIONS = frozenset(_ANNOTATIONS.split())
KEYWORDS = ANNOTATIONS.union(_BY_NAME, _LISTS, _SINGLE, _VALUES.split())


def check_schema(schema: Any, param: str) -> None:
    """Raises InvalidRequest naming `param` and the place in the schema."""
    if _depth(schema) > MAX_DEPTH:
        _refuse(param, f"the schema is nested more than {MAX_DEPTH} levels deep")
    size = len(msgspec.json.encode(schema))
    if size > MAX_BYTES:
        _refuse(param, f"the schema has {size} bytes; the limit is {MAX_BYTES}")
    parts = list(_walk(schema, (), param))
    for place, part in parts:
        _check_part(part, place, param)
    if sum(len(part.get("patternProperties", ())) for _, part in parts) > MAX_NAME_PATTERNS:
        _refuse(param, f"the schema has more than {MAX_NAME_PATTERNS} patternProperties")
    if math.lcm(*(_digits(part["multipleOf"]) for _, part in parts if "multipleOf" in part)) > MAX_MULTIPLE:
        _refuse(param, f"the multipleOf of the schema have more than {MAX_MULTIPLE} as their common multiple")
    if len(references(schema)) > MAX_REFERENCES:
        _refuse(param, f"the schema has more than {MAX_REFERENCES} different references")
    if not _ends(schema):
        _refuse(param, "no value is ever complete: each must contain another one")


def with_exact_dates(schema: Any) -> Any:
    """The same schema, with patterns for the formats of dates: the grammar library's own take some that do not exist."""
    exact = copy.deepcopy(schema)
    for _, part in list(_walk(exact, (), "")):
        pattern = dates.PATTERNS.get(part.get("format", ""))
        if pattern is not None:
            del part["format"]
            part["allOf"] = [*part.get("allOf", []), {"pattern": pattern}]
    return exact


def resolve(reference: str, root: Any) -> Any:
    """What a reference within the schema points to; None if it is nothing that is there."""
    if not reference.startswith("#") or reference[1:2] not in ("", "/"):
        return None
    found = root
    for step in reference.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return None
    return found


def references(schema: Any) -> set[str]:
    """Of a schema that was checked."""
    return {part["$ref"] for _, part in _walk(schema, (), "") if "$ref" in part}


def refuse(param: str, place: Path, sentence: str) -> NoReturn:
    """Names the place in the schema, too."""
    where = ".".join(place)
    _refuse(param, f"{where}: {sentence}" if where else sentence)


def _refuse(param: str, sentence: str) -> NoReturn:
    raise InvalidRequest(f"{param}: {sentence}"[:MAX_SENTENCE_CHARS], param=param)


def _depth(value: Any) -> int:
    """Without recursion: a body may be nested deeper than Python's stack."""
    depth, level = 0, [value]
    while level := [inner for outer in level for inner in _inner(outer)]:
        depth += 1
    return depth


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _walk(schema: Any, place: Path, param: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every schema in it that is an object, with its place."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        refuse(param, place, "a schema must be an object, true or false")
    yield place, schema
    for key in _BY_NAME:
        by_name = schema.get(key, {})
        if not isinstance(by_name, dict):
            refuse(param, (*place, key), "must be an object")
        for name, inner in by_name.items():
            yield from _walk(inner, (*place, key, name), param)
    for key in _LISTS:
        inners = schema.get(key, [])
        if not isinstance(inners, list):
            refuse(param, (*place, key), "must be an array")
        for index, inner in enumerate(inners):
            yield from _walk(inner, (*place, f"{key}[{index}]"), param)
    for key in _SINGLE:
        if key in schema:
            yield from _walk(schema[key], (*place, key), param)


def _check_part(part: dict[str, Any], place: Path, param: str) -> None:
    for key in part:
        if key not in KEYWORDS:
            refuse(param, place, f"the keyword {echo(key)} is not supported")
    reference = part.get("$ref")
    if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
        refuse(param, (*place, "$ref"), "only references within the schema are supported")
    if not isinstance(part.get("format", ""), str):
        refuse(param, (*place, "format"), "must be a string")
    multiple = part.get("multipleOf", 1)
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or multiple <= 0:
        refuse(param, (*place, "multipleOf"), "must be a number above 0")
    required = part.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        refuse(param, (*place, "required"), "must be an array of strings")
    # Names that are not declared may come twice, and would be counted twice.
    fewest = part.get("minProperties", 0)
    if isinstance(fewest, int) and fewest > len(set(required)) + 1:
        refuse(param, (*place, "minProperties"), "is supported up to one more than the required properties")


def _digits(number: float) -> int:
    """Without its point and the zeros at its end: 2.50 and 250 are 25."""
    return int("".join(map(str, Decimal(str(number)).normalize().as_tuple().digits)))


def _ends(root: Any) -> bool:
    """Whether some value is finite. References that are not yet known to end count as endless, until nothing new is found."""
    targets = {ref: resolve(ref, root) for ref in references(root)}
    ending: set[str] = set()
    while new := {
        ref for ref, target in targets.items() if ref not in ending and _ends_if(target, ending, targets)
    }:
        ending |= new
    return _ends_if(root, ending, targets)


def _ends_if(schema: Any, ending: set[str], targets: dict[str, Any]) -> bool:
    """`ending`: references that lead to a finite value. What is not there is for the library to say."""
    if not isinstance(schema, dict) or "enum" in schema or "const" in schema:
        return True
    reference = schema.get("$ref")
    if reference is not None and targets[reference] is not None and reference not in ending:
        return False
    needed = list(schema.get("allOf", []))
    if schema.get("type") == "object":
        needed += [schema.get("properties", {}).get(name) for name in schema.get("required", [])]
    if schema.get("type") == "array" and schema.get("minItems", 0):
        needed.append(schema.get("items"))
    if not all(_ends_if(inner, ending, targets) for inner in needed):
        return False
    return all(
        any(_ends_if(inner, ending, targets) for inner in schema[key]) or not schema[key]
        for key in ("anyOf", "oneOf")
        if key in schema
    )
