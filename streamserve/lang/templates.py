"""Chat templates by the names that SGLang's language has for them, for servers that show none. Knows nothing of rendering."""

from collections.abc import Mapping

# Of a model that knows no turns.
PLAIN = """\
{% for m in messages %}{{ m.role | upper }}:{{ m.content }}
{{ "" }}{% endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""

_CHATML = """\
{% for m in messages %}{{ "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>\\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""

_LLAMA_2 = """\
{% set ns = namespace(system="") %}
{%- for m in messages %}
{%- if m.role == "system" %}{% set ns.system = "<<SYS>>\\n" + m.content + "\\n<</SYS>>\\n\\n" %}
{%- elif m.role == "user" %}{{ "<s>[INST] " + ns.system + m.content + " [/INST]" }}{% set ns.system = "" %}
{%- else %}{{ m.content + " </s>" }}{% endif %}
{%- endfor %}"""

_LLAMA_3 = """\
{{ "<|begin_of_text|>" }}
{%- for m in messages %}{{ "<|start_header_id|>" + m.role + "<|end_header_id|>\\n\\n" + m.content + "<|eot_id|>" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}"""

_GEMMA = """\
{% for m in messages %}
{%- set role = "model" if m.role == "assistant" else m.role %}
{{- "<start_of_turn>" + role + "\\n" + m.content + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\\n" }}{% endif %}"""

_VICUNA = """\
{% if messages and messages[0].role != "system" -%}
A chat between a curious user and an artificial intelligence assistant.
{{- " The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == "system" %}{{ m.content + " " }}
{%- elif m.role == "user" %}{{ "USER: " + m.content + " " }}
{%- else %}{{ "ASSISTANT:" + m.content + "</s>" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "ASSISTANT:" }}{% endif %}"""

TEMPLATES: Mapping[str, str] = {
    "default": PLAIN,
    "chatml": _CHATML,
    "llama-2-chat": _LLAMA_2,
    "llama-3-instruct": _LLAMA_3,
    "gemma-it": _GEMMA,
    "vicuna_v1.1": _VICUNA,
}
