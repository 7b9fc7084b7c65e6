"""The arguments of a call in DSML: a parameter for each, its value as raw text where it is a string, else as JSON. Pure.

  <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
  <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>

A string whose schema has more than a length or a list of values (a pattern, a format) is written as JSON too: the grammar
library checks those in JSON only.
"""

import re
from typing import Any

from cluster.errors import echo
from cluster.json_schema import ANNOTATIONS, DEFINITIONS, references, refuse, resolve
from cluster.lark import Lark, literal

_TOP_LEVEL = {"type", "properties", "required", "additionalProperties", *DEFINITIONS, *ANNOTATIONS}
_LENGTHS = {"minLength", "maxLength"}
_LISTED = {"enum", "const"}
_ANY_NAME = r'/"[^"\n]{1,64}"/'
_PARAMETER_END = "</｜DSML｜parameter>\n"
_CALL_END = "</｜DSML｜"


class Parameters:
    """Writes what follows the opening tag of an invoke, up to the marker in its closing tag."""

    def __init__(self, lark: Lark, marker: str) -> None:
        self._lark = lark
        self._marker = marker

    def any(self) -> str:
        """Arguments of any name and value."""
        head = self._lark.text("<｜DSML｜parameter name=")
        name = self._lark.terminal(_ANY_NAME)
        one = self._lark.rule(f"{head} {name} {self._value([self._any_text()], [{}])}")
        return self._lark.choice([self._end("\n"), f"{one}+ {self._end('')}"])

    def strict(self, schema: dict[str, Any], param: str) -> str:
        """Declared arguments only, in their order. Raises InvalidRequest."""
        for reference in sorted(references(schema)):
            if reference.split("/")[1:2] not in ([name] for name in DEFINITIONS):
                refuse(param, (), f"{echo(reference)}: only references to definitions are supported")
        schema, root = self._top(schema, param), schema
        properties: dict[str, Any] = schema.get("properties", {})
        required = set(schema.get("required", []))
        for name in sorted(required - set(properties)):
            refuse(param, ("required",), f"{echo(name)} is not among the properties")
        some, rest = "", self._end("")  # of the properties from the current one on: at least one, or any
        for name, inner in reversed(properties.items()):
            one = self._one(name, inner, root, param)
            if name in required:
                some = rest = self._lark.rule(f"{one} {rest}")
            else:
                some = self._lark.rule(f"{one} {rest} | {some}" if some else f"{one} {rest}")
                rest = self._lark.rule(f"{one} {rest} | {rest}")
        alternatives = [some] if some else []
        return self._lark.choice(alternatives if required else [*alternatives, self._end("\n")])

    def _top(self, schema: dict[str, Any], param: str) -> dict[str, Any]:
        top = self._follow(schema, schema, (), param)
        for key in top:
            if key not in _TOP_LEVEL:
                refuse(param, (), f"{key} is not supported at the top of a strict function's parameters")
        if top.get("type", "object") != "object":
            refuse(param, ("type",), "must be object")
        return top

    def _one(self, name: str, schema: Any, root: dict[str, Any], param: str) -> str:
        if not re.fullmatch(r'[^"\n<>]+', name) or self._marker in name:
            refuse(param, ("properties", name), 'the name of a parameter must have no ", <, > or line break')
        texts, others = self._split(schema, root, ("properties", name), param)
        definitions = {key: root[key] for key in DEFINITIONS if key in root}
        head = f'<｜DSML｜parameter name="{name}"'
        return self._value(texts, [{"anyOf": others, **definitions}] if others else [], head)

    def _value(self, texts: list[str], schemas: list[Any], head: str = "") -> str:
        """head: what is written before the attribute `string`, if it is known."""
        alternatives = []
        if texts:
            opening = self._lark.text(f'{head} string="true">')
            alternatives += [f"{opening} {self._lark.until(text, _PARAMETER_END)}" for text in texts]
        for schema in schemas:
            opening = self._lark.text(f'{head} string="false">')
            alternatives.append(f"{opening} {self._lark.json(schema)} {self._lark.text(_PARAMETER_END)}")
        return self._lark.choice(alternatives)

    def _end(self, before: str) -> str:
        return self._lark.text(before + _CALL_END)

    def _split(
        self, schema: Any, root: dict[str, Any], place: tuple[str, ...], param: str
    ) -> tuple[list[str], list[Any]]:
        """Terminals for the strings that the schema allows, and schemas for what else it allows."""
        schema = self._follow(schema, root, place, param)
        if schema is False:
            refuse(param, place, "no value is allowed")
        keys = set() if schema is True else set(schema) - ANNOTATIONS - set(DEFINITIONS)
        if not keys:
            return [self._any_text()], [{"type": ["null", "boolean", "number", "array", "object"]}]
        if keys == {"anyOf"}:
            both = [self._split(inner, root, (*place, "anyOf"), param) for inner in schema["anyOf"]]
            return [text for texts, _ in both for text in texts], [
                other for _, others in both for other in others
            ]
        types = schema.get("type")
        if isinstance(types, list) and "string" in types and len(types) > 1:
            rest = [name for name in types if name != "string"]
            texts, others = self._split(schema | {"type": "string"}, root, place, param)
            return texts, [*others, schema | {"type": rest}]
        if keys & _LISTED and keys <= _LISTED | {"type"} and types in (None, "string", ["string"]):
            return self._listed(schema, types, place, param)
        if types in ("string", ["string"]) and keys <= {"type"} | _LENGTHS:
            return [self._text(schema.get("minLength", 0), schema.get("maxLength"), place, param)], []
        return [], [schema]

    def _listed(
        self, schema: dict[str, Any], types: Any, place: tuple[str, ...], param: str
    ) -> tuple[list[str], list[Any]]:
        listed = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(listed, list):
            refuse(param, (*place, "enum"), "must be an array")
        if "const" in schema and "enum" in schema or not listed:
            return [], [schema]
        texts = [value for value in listed if isinstance(value, str)]
        others = [value for value in listed if not isinstance(value, str)]
        if any(self._marker in text for text in texts):
            refuse(param, place, f"a value must not contain {self._marker}")
        alternatives = " | ".join(literal(text) or '""' for text in texts)
        terminals = [self._lark.terminal(f"({alternatives})")] if texts else []
        schemas = [{"enum": others}] if others and types is None else []
        if not terminals and not schemas:
            refuse(param, place, "no value is allowed")
        return terminals, schemas

    def _any_text(self) -> str:
        """The marker is no text."""
        return self._lark.without("(?s:.*)", self._marker)

    def _text(self, fewest: Any, most: Any, place: tuple[str, ...], param: str) -> str:
        for key, value in (("minLength", fewest), ("maxLength", most)):
            if value is not None and (type(value) is not int or value < 0):
                refuse(param, (*place, key), "must be a whole number from 0 on")
        if most is not None and most < fewest:
            refuse(param, place, "maxLength is less than minLength")
        return self._lark.without(f"(?s:.{{{fewest},{'' if most is None else most}}})", self._marker)

    def _follow(self, schema: Any, root: dict[str, Any], place: tuple[str, ...], param: str) -> Any:
        """What a schema that is but a reference refers to."""
        seen: set[str] = set()
        while isinstance(schema, dict) and set(schema) - ANNOTATIONS - set(DEFINITIONS) == {"$ref"}:
            reference = schema["$ref"]
            found = resolve(reference, root)
            if found is None or reference in seen:
                refuse(param, (*place, "$ref"), f"{echo(reference)} leads nowhere")
            seen.add(reference)
            schema = found
        return schema
