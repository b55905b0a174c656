"""Chat templates and tokenizers from anyone: rendered as transformers does, within bounds, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import ADAPTERS, KINDS, PARITY, REMOVED, copy_backbone, edit_json
from tokenizers import Tokenizer
from transformers import AutoModel, PreTrainedTokenizerFast

from diffretriever.model.chat_template import render_chat, render_prompt, render_prompts
from diffretriever.model.configuration_diffretriever import DiffRetrieverConfig, paper_prompt
from diffretriever.model.tokenization_helpers import RetrievalTokenizer
from diffretriever.publishing import build as building

LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
GROWING = "{%% set n = namespace(s='a') %%}{%% for i in range(99) %%}{%% set n.s = %s %%}{%% endfor %%}{{ n.s }}"
LONG = "{% set a = 'a'*9999 %}" + "{% set a = a ~ a %}" * 4 + "{% set b = a[:80000] ~ 'b' %}"
NUMBER = "{% set n = namespace(x=3) %}{% for i in range(17) %}{% set n.y = n.x %}{% set n.x = n.x * n.x %}{% endfor %}"


def often(beginning: str, body: str) -> str:
    return beginning + "{% for i in range(9999) %}" + body * 60 + "{% endfor %}"


HOSTILE_TEMPLATES = {
    "loops": LOOPS,
    "repetition": "{{ 'a'*1000000000 }}",
    "a list's repetition": "{{ [0]*1000000000 }}",
    "powers": "{{ 10**10**10 }}",
    "products": "{% set n = namespace(s=3) %}{% for i in range(99) %}{% set n.s = n.s*n.s %}{% endfor %}",
    "joined": GROWING % "n.s ~ n.s",
    "added": GROWING % "n.s + n.s",
    "added in a row": "{% set s = 'a' %}" + "{% set s = s+s %}" * 99,
    "lists of lists": "{% set a = ['x'] %}" + "{% set a = [a,a] %}" * 60 + "{{ a }}",
    "compared": "{% set a = ['x'] %}{% set b = ['x'] %}"
    + "{% set a = [a,a] %}{% set b = [b,b] %}" * 40
    + "{{ a == b }}",
    "objects of objects": "{% set a = dict(x=1) %}" + "{% set a = dict(x=a,y=a) %}" * 60 + "{{ a|tojson }}",
    "center": "{{ 'a'.center(10000000000) }}",
    "center filter": "{{ 'a'|center(10000000000) }}",
    "printf": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "zfill": "{{ '1'.zfill(10000000000) }}",
    "replace": "{% set s = 'a'*100000 %}{{ s.replace('a', s) }}",
    "replace filter": "{% set s = 'a'*100000 %}{{ s|replace('a', s) }}",
    "join": "{% set s = 'a'*100000 %}{{ s.join(s) }}",
    "join filter": "{% set s = 'a'*100000 %}{{ [" + "s," * 9000 + "]|join }}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursion": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "recursive loop": "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "callers": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 40
    + "x"
    + "{% endcall %}" * 40,
    "lipsum": "{{ lipsum(n=1000000) }}",
    "date": "{{ strftime_now('%1000000000d') }}",
    "batch": "{{ range(10)|batch(1000000000,'x')|list }}",
    "slice": "{{ range(10)|slice(100000000)|list }}",
    "maps": "{{ range(9000)|list" + "|map('upper')|list" * 500 + " }}",
    "searched": often(LONG, "{{ b in a }}"),
    "searched by a test": often(LONG, "{{ b is in a }}"),
    "looked through": often(LONG, "{{ a is lower }}"),
    "slices": often(LONG, "{% set c = a[::-1] %}"),
    "divided": often(NUMBER, "{% set c = n.x // n.y %}"),
    "length": "x" * 70_000,
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested loops": "{% for a in messages %}" * 60 + "{% endfor %}" * 60,
    "braces": "{{" * 30_000,
    "comments": "{#" * 30_000,
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ namespace.__init__.__globals__ }}",
    "attribute filter": "{{ messages|map(attribute='__class__')|map(attribute='__mro__')|first|first }}",
    "appended": "{{ messages.append(1) }}",
    "included": "{% include 'x' %}",
    "undefined": "{{ a.b.c }}",
    "raised": "{{ raise_exception('no such role') }}",
    "broken": "{% for %}",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(PARITY / "backbones" / "tiny-dream")


@pytest.mark.once
@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_hostile_templates(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", HOSTILE_TEMPLATES[name])
    with pytest.raises(ValueError, match=r"(?s)^The chat template of the tokenizer of '.*tiny-dream'") as failure:
        render_prompt(tokenizer, paper_prompt("query", 1))
    assert len(str(failure.value)) < 500


def test_a_hostile_template_in_a_release(tmp_path: Path) -> None:
    base, release = copy_backbone("llada", tmp_path / "base"), tmp_path / f"release-{tmp_path.name}"
    building.build(str(base), release, str(PARITY / "adapters" / ADAPTERS["llada"]))
    (release / "chat_template.jinja").write_text(LOOPS)
    edit_json(release / "tokenizer_config.json", chat_template=REMOVED)
    with pytest.raises(ValueError, match="cannot be rendered: TemplateError: it asks for more than a prompt can need"):
        AutoModel.from_pretrained(release, trust_remote_code=True)


QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN_3 = (
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi_step_tool and message.role == 'user' and message.content is string and "
    "not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}{{ ns.last_query_index }}"
)
LLAMA_3 = (
    "{{- bos_token if bos_token is defined else '' }}{%- set date = strftime_now('%d %b %Y') %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date + '\n' + system + '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
)
ALL_SORTS = (
    "{% macro role(m) %}<|{{ m.role|upper }}|>{% endmacro %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% generation %}{{ message.content }}{% endgeneration %}\n{% else %}"
    "{{ role(message) }}\n    {{ message.content.replace('a', 'b').strip() }}{% endif %}\n"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ['x','y']|join('-') ~ 1 ~ none }}"
    " {{ {'a': [1, 'é']}|tojson(indent=2) }} {{ ('a','b')|list }} "
    "{% for k, v in {'q':1}.items() %}{{k}}{{v}}{% endfor %}"
    " {{ messages|map(attribute='role')|join(',') }} {{ messages|selectattr('role','equalto','user')|list|length }} "
    "{{ range(3)|list }} {{ 'ab' * 2 }} {{ 7 % 3 }}{{ -1 }}{{ 2.5 }} {% set x %}in{% endset %}{{ x }} <&> {{ '<&>' }}"
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "template", [None, QWEN, QWEN_3, LLAMA_3, ALL_SORTS], ids=["own", "Qwen2", "Qwen3", "Llama3", "all"]
)
@pytest.mark.parametrize("system", ["You are an AI assistant.", "  white space ", ""])
def test_templates_are_rendered_to_the_byte_as_transformers_does(kind: str, template: str | None, system: str) -> None:
    own = PreTrainedTokenizerFast.from_pretrained(PARITY / "backbones" / f"tiny-{kind}")
    own.chat_template = template or own.chat_template
    messages = [{"role": "system", "content": system}, {"role": "user", "content": 'a "{text}" <b> é & \n'}]
    expected = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_chat(own, messages) == expected


# ------------------------------------------------------------------------------------------ tokenizers


class PanicException(BaseException):
    """As pyo3 raises it where Rust panics: no Exception."""


class Panicking:
    """A tokenizer whose library panics when its `step` is called."""

    def __init__(self, tokenizer: Any, step: str, error: BaseException) -> None:
        self.__dict__.update(tokenizer=tokenizer, step=step, error=error)

    def __getattr__(self, name: str) -> Any:
        if name == "backend_tokenizer":
            return Panicking(self.tokenizer.backend_tokenizer, self.step, self.error)
        return self._raise if name == self.step else getattr(self.tokenizer, name)

    from_str = staticmethod(Tokenizer.from_str)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._raise() if self.step == "__call__" else self.tokenizer(*args, **kwargs)

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("step", ["to_str", "__call__"])
def test_panics_of_the_tokenizers_library(step: str, tokenizer: Any) -> None:
    config = DiffRetrieverConfig()
    prompts = render_prompts(tokenizer, config)
    broken = Panicking(tokenizer, step, PanicException("index out of bounds"))
    with pytest.raises(
        ValueError, match=r"tokenizer of .*tokenizer\.json.* cannot be used: PanicException: index out of"
    ):
        RetrievalTokenizer(broken, config, prompts)
    for error in (KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(error)):
            RetrievalTokenizer(Panicking(tokenizer, step, error), config, prompts)


def test_panics_while_texts_are_tokenised(tokenizer: Any) -> None:
    config = DiffRetrieverConfig()
    rules = RetrievalTokenizer(tokenizer, config, render_prompts(tokenizer, config))
    rules._plain = Panicking(rules._plain, "encode_batch_fast", PanicException("unwrap on None"))
    with pytest.raises(ValueError, match="cannot be used: PanicException: unwrap on None"):
        rules.tokenize(["a"], True)
