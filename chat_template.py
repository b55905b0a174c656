"""The retrieval prompt through a tokenizer's chat template (paper §3.1), which may come from anyone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LONGEST_TEMPLATE = 65_536  # characters
TEMPLATE_BUDGET = 2_000_000  # characters that a rendering may handle, all in all
# What templates may use; of the rest, some could write gigabytes at one call.
TEMPLATE_FILTERS = """
    abs capitalize count d default dictsort e escape first float int items join last length list lower map reject
    rejectattr replace reverse safe select selectattr sort string title trim unique upper
"""
TEMPLATE_METHODS = frozenset(
    """
    capitalize count endswith find get index isalnum isalpha isdigit islower isspace istitle isupper items join keys
    lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines
    startswith strip swapcase title upper values
    """.split()
)


class _Meter(NodeTransformer):
    """Puts a count on what a template does without a call: turns, lists, joined strings, comparisons, tests, slices."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise TemplateError("recursive loops are not rendered here")
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "turns", [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "joined", [], [], None, None)

    def visit_Compare(self, node: Any) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _counted(node.expr)
        for operand in node.ops:
            operand.expr = _counted(operand.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Test:
        self.generic_visit(node)
        node.node, node.args = _counted(node.node), [_counted(value) for value in node.args]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _counted(node.node)
        return node

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _counted(node)

    visit_List = visit_Tuple = visit_Dict = _literal


def _counted(node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, "sized", [], [], None, None)


class _GenerationBlock(Extension):
    """`{% generation %}`, in which transformers' templates say what the assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, but that a template cannot take for ever or fill the memory.

    Every operation is charged, before it runs, for what it may at most bring forth.

    Args:
        length: characters of the template.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, length: int) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock], finalize=self._sized
        )
        self._left = TEMPLATE_BUDGET
        self._turn = 100 + length  # each turn and call may write the whole template
        allowed: dict[str, Any] = {name: self.filters[name] for name in TEMPLATE_FILTERS.split()}
        self.filters: dict[str, Any] = {name: self._charged(function) for name, function in allowed.items()}
        self.filters |= {"tojson": self._charged(_to_json), "turns": self._turns, "joined": self._joined}
        self.filters["sized"] = self._sized
        kept = {name: self.globals[name] for name in ("dict", "namespace", "range")}
        self.globals = {**kept, "raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _spend(self, units: int) -> None:
        self._left -= units
        if self._left < 0:
            raise TemplateError("it asks for more than a prompt can need")

    def _size(self, value: Any) -> int:
        """Return the characters that a value takes when it is written, lists and objects counted through."""
        size, waiting = 0, [value]
        while waiting and size <= TEMPLATE_BUDGET:
            item = waiting.pop()
            size += 1
            if isinstance(item, (str, range)):
                size += len(item)
            elif isinstance(item, int):
                size += item.bit_length()
            elif isinstance(item, Mapping):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple)):
                waiting += item
        return size

    def _sized(self, value: Any) -> Any:
        self._spend(self._size(value))
        return value

    def _turns(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend(self._turn)
            yield value

    def _joined(self, values: list[Any]) -> str:
        return "".join(map(str, self._sized(values)))

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # jinja reads the function's attributes
        def charged(*args: Any, **kwargs: Any) -> Any:
            given = (
                value for value in (*args, *kwargs.values()) if not isinstance(value, (Context, nodes.EvalContext))
            )
            self._spend(math.prod(map(self._size, given)))
            result = function(*args, **kwargs)
            return list(result) if isinstance(result, Iterator) else result

        return charged

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        self._spend(self._turn)
        owner = getattr(function, "__self__", None)
        sizes = (self._size(value) for value in (owner, *args, *kwargs.values()))
        self._spend(math.prod(sizes))
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: D102
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise TemplateError(f"`{operator}` is not rendered here")
        numbers = [value for value in (left, right) if isinstance(value, int)]
        times = max(map(abs, numbers)) if operator == "*" and len(numbers) == 1 else 1
        self._spend((self._size(left) + self._size(right)) * times)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `format` of strings to `is_safe_attribute`, which does not let it through."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: D102
        plain = isinstance(obj, (str, bytes, int, float, list, tuple, Mapping, range))
        return super().is_safe_attribute(obj, attr, value) and (not plain or attr in TEMPLATE_METHODS)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Write JSON as transformers' templates expect it, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=min(indent, 8) if indent else indent, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    if not re.fullmatch(r"[^0-9]{0,100}", form):  # "%1000000000d" writes so many digits
        raise TemplateError("a form of the date with digits in it is not rendered here")
    return datetime.now().strftime(form)


def render_chat(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Render messages, and the beginning of the answer, as the tokenizer's `apply_chat_template` does.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: each with its role and content.

    Raises:
        ValueError: the tokenizer has no chat template, or one that is broken or asks for too much.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template (`chat_template` in "
            "tokenizer_config.json or chat_template.jinja); the retrieval prompt needs one."
        )
    try:
        template = tokenizer.get_chat_template()
        if len(template) > LONGEST_TEMPLATE:
            raise TemplateError(f"it has {len(template)} characters, at most {LONGEST_TEMPLATE}")
        environment = ChatTemplateEnvironment(len(template))
        compiled = environment.from_string(_Meter().visit(environment.parse(template)))
        given = {**tokenizer.special_tokens_map, "messages": messages, "tools": None, "documents": None}
        return compiled.render(**given, add_generation_prompt=True)
    except Exception as error:  # whatever a template can make Python raise
        raise ValueError(
            f"The chat template of the tokenizer of {tokenizer.name_or_path!r} cannot be rendered: "
            f"{type(error).__name__}: {error!s:.200}."
        ) from error


def render_prompt(tokenizer: Any, prompt: dict[str, str]) -> tuple[str, str]:
    """Render a prompt through the tokenizer's chat template and cut it at the text.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        prompt: texts of the roles system, user (with `{text}`) and assistant.

    Returns:
        Everything before the text, and everything between the text and the masks.

    Raises:
        ValueError: the tokenizer has no chat template that can be rendered, or its template does not show the text
            once.
    """
    sentinel = "\N{SYMBOL FOR SUBSTITUTE}"  # the prompt is ours, not the user's: nothing in it looks like this
    messages = [
        {"role": "system", "content": prompt["system"]},
        {"role": "user", "content": prompt["user"].replace("{text}", sentinel)},
    ]
    rendered = render_chat(tokenizer, messages)
    before, found, after = rendered.partition(sentinel)
    if not found or sentinel in after:
        raise ValueError(
            f"The chat template of the tokenizer of {tokenizer.name_or_path!r} shows the user's text "
            f"{rendered.count(sentinel)} times; it must show it once."
        )
    return before, after + prompt["assistant"]


def render_prompts(tokenizer: Any, config: Any) -> dict[tuple[bool, int], tuple[str, str]]:
    """Return the texts before and after a query (True) and a passage (False), by side and K.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        config: the release's `DiffRetrieverConfig`.

    Raises:
        ValueError: as `render_prompt`.
    """
    own = {True: config.num_query_masks, False: config.num_passage_masks}
    wanted = {
        (is_query, k): config.prompt(is_query, k)
        for is_query in own
        for k in (own[is_query], *config.budgets(is_query))
    }
    return {key: render_prompt(tokenizer, prompt) for key, prompt in wanted.items()}
