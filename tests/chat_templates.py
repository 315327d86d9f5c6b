"""Chat templates that know tools, in the ways of two families of models."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer as Backend

from gllm_ray.config import resolve_package_path

DEMO = "package://gllm_ray/demo/model"
TOOLS_OF_QWEN = r"""
{%- if tools %}
{{- "<|system|># Tools\n\nFor each function call, return a json object with function name and " }}
{{- "arguments within <tool_call></tool_call> XML tags:\n<tools>" }}
{%- for tool in tools %}
{{- "\n" }}
{{- tool | tojson }}
{%- endfor %}
{{- "\n</tools>\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n" }}
{{- "</tool_call><|end|>" }}
{%- endif %}
"""
QWEN = (
    TOOLS_OF_QWEN
    + r"""
{%- for message in messages %}
{%- if message.role == "tool" %}
{{- "<|user|>\n<tool_response>\n" + message.content + "\n</tool_response><|end|>" }}
{%- else %}
{{- "<|" + message.role + "|>" + message.content }}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}
{%- set tool_call = tool_call.function %}
{%- endif %}
{{- "\n<tool_call>\n{\"name\": \"" }}
{{- tool_call.name }}
{{- "\", \"arguments\": " }}
{{- tool_call.arguments | tojson }}
{{- "}\n</tool_call>" }}
{%- endfor %}
{{- "<|end|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|assistant|>" }}
{%- endif %}
"""
)
LLAMA = r"""
{%- if custom_tools is defined %}
{%- set tools = custom_tools %}
{%- endif %}
{%- if not tools is defined %}
{%- set tools = none %}
{%- endif %}
{%- if tools is not none %}
{{- "<|system|>Environment: ipython\n" }}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument ' }}
{{- "name and its value}.\n" }}
{%- for t in tools %}
{{- t | tojson(indent=4) }}
{{- "\n\n" }}
{%- endfor %}
{{- "<|end|>" }}
{%- endif %}
{%- for message in messages %}
{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|' + message['role'] + '|>\n\n' + message['content'] | trim + '<|end|>' }}
{%- elif 'tool_calls' in message %}
{%- if not message.tool_calls|length == 1 %}
{{- raise_exception("This model only supports single tool-calls at once!") }}
{%- endif %}
{%- set tool_call = message.tool_calls[0].function %}
{{- '<|assistant|>\n\n{"name": "' + tool_call.name + '", "parameters": ' }}
{{- tool_call.arguments | tojson }}
{{- "}<|end|>" }}
{%- else %}
{{- "<|user|>ipython\n\n" }}
{%- if message.content is mapping or message.content is iterable %}
{{- message.content | tojson }}
{%- else %}
{{- message.content }}
{%- endif %}
{{- "<|end|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\n\n' }}
{%- endif %}
"""
# As of coders: other things between the same markers.
XML = """
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}
{%- if tools %}<tool_call>\n<function=name>\n<parameter=one>\n</tool_call>{% endif %}
{%- for message in messages %}{{ message.content }}
{%- for call in message.tool_calls %}{{ call.arguments | items }}{% endfor %}
{%- endfor %}
"""
# Where what the model says is marked for training, and no tools are known.
MARKED = """
{%- for message in messages %}
{%- if loop.first %}{% continue %}{% endif %}
{% generation %}{{ message.content }}{% endgeneration %}
{%- endfor %}
"""
# Where the model may be told how much to think before it answers.
THINKING = r"""
{%- if reasoning_effort %}<|system|>Reasoning: {{ reasoning_effort }}<|end|>{% endif %}
{%- for message in messages %}
{{- "<|" + message.role + "|>" + message.content + "<|end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|assistant|>" }}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}
"""
# Where a user may have a name.
NAMED = r"""
{%- for message in messages %}
{{- "<|" + message.role + "|>" }}
{%- if message.role == "user" and message.name %}{{ message.name + ": " }}{% endif %}
{{- message.content + "<|end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>" }}{% endif %}
"""


def copy_demo(directory: Path, template: str, special_tokens: tuple[str, ...] = ()) -> str:
    """The demo checkpoint with another chat template, and perhaps more special tokens."""
    shutil.copytree(resolve_package_path(DEMO), directory)
    (directory / "chat_template.jinja").write_text(template)
    file = directory / "tokenizer.json"
    backend = Backend.from_file(str(file))
    if backend.add_special_tokens(list(special_tokens)):
        backend.save(str(file))
        config = json.loads((directory / "config.json").read_text())
        config["vocab_size"] += len(special_tokens)
        (directory / "config.json").write_text(json.dumps(config))
    return str(directory)
