"""What an answer must look like: a grammar from the tools, the choice among them and the reply's format. Pure.

  V3.2      content, then "\\n\\n<｜DSML｜function_calls>", a call for each invoke, an argument for each parameter
  V3.2-Exp  content, then <｜tool▁calls▁begin｜>, a name and a JSON object for each call

A tool that is `strict` gets arguments that its schema allows. Any other gets arguments that can be parsed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.chat_encoding import CALLS_BEGIN, DSML, ChatFormat
from cluster.json_schema import check_schema
from cluster.lark import Lark
from cluster.parameters import Parameters
from cluster.tools import (
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolChoice,
    must_call,
)

_MARKER: dict[ChatFormat, str] = {"v3.2": DSML, "v3.2-exp": CALLS_BEGIN}
_FORMAT_PARAM = "response_format.json_schema.schema"


class Draft(NamedTuple):
    """A grammar, and the parts of it that come from a client's schema, each a grammar by itself and with its field's name."""

    text: str
    parts: list[tuple[str, str]]


def draft(
    *,
    chat_format: ChatFormat,
    markers: Mapping[str, int],
    tools: Sequence[Tool] = (),
    choice: ToolChoice | None = None,
    parallel: bool = True,
    response_format: ResponseFormat | None = None,
) -> Draft | None:
    """None: the answer is free. Raises InvalidRequest naming the field of a schema that is not supported.

    markers: those of the chat format that are tokens of their own
    """
    schema = _schema(response_format)
    if choice == "none":
        tools = ()
    strict = [(_param(index), tool) for index, tool in enumerate(tools) if tool.strict]
    if not (must_call(choice) or schema is not None or strict or (tools and not parallel)):
        return None
    for param, tool in strict:
        check_schema(_arguments(tool), param)
    if schema is not None:
        check_schema(schema, _FORMAT_PARAM)
    writer = _Writer(chat_format, markers)
    alternatives = []
    if not must_call(choice):
        alternatives.append(writer.content if schema is None else writer.lark.json(schema))
    if tools:
        named = choice.function.name if isinstance(choice, NamedTool) else None
        alternatives.append(
            writer.calls(
                [(_param(index), tool) for index, tool in enumerate(tools) if named in (None, tool.name)],
                several=parallel and named is None,
                after_content=not must_call(choice) and schema is None,
            )
        )
    parts = [(param, tool_grammar(chat_format, markers, tool, param)) for param, tool in strict]
    if schema is not None:
        parts.append((_FORMAT_PARAM, json_grammar(schema)))
    return Draft(writer.lark.start(" | ".join(alternatives)), parts)


def json_grammar(schema: Any) -> str:
    """JSON that the schema allows, and nothing else."""
    lark = Lark({})
    return lark.start(lark.json(schema))


def tool_grammar(chat_format: ChatFormat, markers: Mapping[str, int], tool: Tool, param: str) -> str:
    """A call of this tool alone. param: the field of its schema."""
    writer = _Writer(chat_format, markers)
    return writer.lark.start(writer.call(tool, param))


def _arguments(tool: Tool) -> dict[str, Any]:
    """What a strict tool takes; nothing if it says nothing."""
    return tool.function.get("parameters") or {"type": "object", "additionalProperties": False}


def _param(index: int) -> str:
    return f"tools[{index}].function.parameters"


def _schema(response_format: ResponseFormat | None) -> Any:
    if isinstance(response_format, JsonSchemaFormat):
        return response_format.json_schema.schema
    return {"type": "object"} if isinstance(response_format, JsonObjectFormat) else None


class _Writer:
    """The parts of an answer in one chat format."""

    def __init__(self, chat_format: ChatFormat, markers: Mapping[str, int]) -> None:
        self.lark = Lark(markers)
        self._dsml = chat_format == "v3.2"
        self._marker = _MARKER[chat_format]
        self.content = self.lark.without("(?s:.*)", self._marker)

    def calls(self, tools: Sequence[tuple[str, Tool]], *, several: bool, after_content: bool) -> str:
        """tools: each after the field of its schema. One call of one of them, or several of any."""
        call = self.lark.choice([self.call(tool, param) for param, tool in tools])
        opening, between, closing = self._brackets()
        before = self.lark.until(self.content, opening) if after_content else self.lark.text(opening)
        more = f"({self.lark.text(between)} {call})*" if several else ""
        return self.lark.rule(f"{before} {call} {more} {self.lark.text(closing)}")

    def call(self, tool: Tool, param: str) -> str:
        """What stands between the brackets."""
        if self._dsml:
            parameters = Parameters(self.lark, self._marker)
            arguments = parameters.strict(_arguments(tool), param) if tool.strict else parameters.any()
            opening = self.lark.text(f'invoke name="{tool.name}">\n')
            return self.lark.rule(f"{opening} {arguments}")
        schema = _arguments(tool) if tool.strict else {"type": "object"}
        name, end = self.lark.text(f"{tool.name}<｜tool▁sep｜>"), self.lark.text("<｜tool▁call▁end｜>")
        return self.lark.rule(f"{name} {self.lark.json(schema)} {end}")

    def _brackets(self) -> tuple[str, str, str]:
        """What is written before the first call, between two, and after the last."""
        if self._dsml:
            # A call ends after the marker of its own closing tag.
            return (
                "\n\n<｜DSML｜function_calls>\n<｜DSML｜",
                "invoke>\n<｜DSML｜",
                "invoke>\n</｜DSML｜function_calls>",
            )
        return "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>"
