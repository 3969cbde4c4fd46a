"""Templates that users write, kept from reaching anything but the row.

Jinja templates run in Jinja's immutable sandbox: no attribute that starts with an underscore, no
changing of the row, no import or include. Format strings are read by our own reader, since
`str.format` itself follows `{a.__class__}` and pads to any width.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunery.errors import InvalidData

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2.parser import Parser

MAX_TEMPLATE_CHARS = 65_536
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class GenerationBlock(Extension):
    """Accepts `{% generation %}…{% endgeneration %}`, which marks what the assistant says.

    Only its syntax: the trainer renders chat templates through transformers, which knows where
    such a block begins and ends.
    """

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        extensions=[GenerationBlock, loopcontrols],
    )
    return environment


def check_jinja(source: str) -> str:
    """Return `source` if it parses.

    Raises:
        ValueError: too long, or not Jinja; names the line.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ValueError(f"template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS}")
    try:
        tree = _environment().parse(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} of the template: {error.message}") from error
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise ValueError(f"line {node.lineno} of the template: other templates cannot be loaded")
    return source


def render_jinja(source: str, row: Mapping[str, Any]) -> str:
    """The template over the row's fields.

    Raises:
        InvalidData: a field is missing, or the template did what it may not.
    """
    try:
        return str(_compiled(source).render(**row))
    except SecurityError as error:
        raise InvalidData(f"the template was stopped: {error}", code="template_error") from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        # TypeError's and ValueError's own words may quote the row.
        reason = str(error) if isinstance(error, TemplateError) else type(error).__name__
        raise InvalidData(f"the template failed: {reason}", code="template_error") from error


@lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


def check_format(source: str) -> str:
    """Return `source` if it is a format string of plain `{field}` places only.

    Raises:
        ValueError: too long, a lone brace, or a place that is not a plain name.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ValueError(f"template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS}")
    for match in _FIELD.finditer(source):
        name = match.group(1)
        if name is None and match.group() in "{}":
            raise ValueError(f"single {match.group()!r} at {match.start()}; write it twice")
        if name is not None and not name.isidentifier():
            raise ValueError(f"{match.group()!r} is not a plain field name; only {{field}} works")
    return source


def render_format(source: str, row: Mapping[str, Any]) -> str:
    """The format string over the row's fields.

    Raises:
        InvalidData: a field is missing.
    """

    def place(match: re.Match[str]) -> str:
        name = match.group(1)
        if name is None:
            return match.group()[0]
        if name not in row:
            known = ", ".join(sorted(row))
            raise InvalidData(
                f"the template asks for {name!r}; the row has {known}", code="template_error"
            )
        return str(row[name])

    return _FIELD.sub(place, source)
