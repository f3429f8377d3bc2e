"""Does an exported model carry the prompt that it was trained with? Its chat template and its Ollama Modelfile, compared.

Other servers (vLLM, Ollama) don't know LLaMA-Factory's templates: vLLM reads chat_template.jinja, Ollama the Modelfile. Both
are rendered here over a dialogue of two turns, without and with a system prompt, and must give the token ids that LLaMA-Factory
trains on. Where LLaMA-Factory's files don't, they are written anew from the same template.

Ollama renders Go templates. The few forms that occur in these Modelfiles are translated to Jinja; Ollama itself isn't run.
"""

import re
from pathlib import Path
from typing import Any

from medasst_tools.errors import CheckFailed

DIALOGUE = [
    {"role": "user", "content": "孩子发烧 38.5 度怎么办？"},
    {"role": "assistant", "content": "先量体温、多喝水；\n精神差请就医。"},
    {"role": "user", "content": "能吃 “退烧药” 吗？"},
]
OTHER_SYSTEM = "请简短回答。"
# Ollama's own defaults are temperature 0.8 and a repeat penalty of 1.1; ours is greedy, as in chat.yaml
GREEDY = "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"


def correct_prompts(folder: Path, chat: dict[str, str]) -> list[str]:
    """Correct the exported folder's chat template and Modelfile where they differ from `chat`'s template and system prompt.

    Return a line for each correction. CheckFailed if they differ even then: nothing must serve that model.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    carried = tokenizer.chat_template
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(**chat))
    tokenizer.chat_template = carried
    corrections = []
    if difference := chat_template_difference(tokenizer, template):
        tokenizer.chat_template = template._get_jinja_template(tokenizer)
        tokenizer.save_pretrained(folder)
        corrections.append(f"chat_template.jinja: {difference}")
        if difference := chat_template_difference(tokenizer, template):
            raise CheckFailed(
                f"{chat['template']}: no chat template of LLaMA-Factory's gives its prompt ({difference})"
            )
    path = folder / "Modelfile"
    text = path.read_text(encoding="utf-8")
    if difference := modelfile_difference(text, tokenizer, template):
        text = write_modelfile(tokenizer, template)
        corrections.append(f"Modelfile: {difference}")
        if difference := modelfile_difference(text, tokenizer, template):
            raise CheckFailed(f"{chat['template']}: no Modelfile gives LLaMA-Factory's prompt ({difference})")
    path.write_text(text.removesuffix(GREEDY) + GREEDY, encoding="utf-8")
    return corrections


def reference_ids(tokenizer, template, system: str | None) -> list[int]:
    """Return the prompt of DIALOGUE as LLaMA-Factory encodes it, without a begin token: each server adds that itself."""
    ids = template.encode_oneturn(tokenizer, [*DIALOGUE, {"role": "assistant", "content": ""}], system)[0]
    return without_bos(ids, tokenizer)


def without_bos(ids: list[int], tokenizer) -> list[int]:
    """Return the ids without the begin token at their start."""
    return ids[1:] if ids and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else ids


def chat_template_difference(tokenizer, template) -> str | None:
    """Say how the tokenizer's chat template differs from LLaMA-Factory's prompt; None if it doesn't."""
    if not tokenizer.chat_template:
        return "there is none"
    for name, system in (("its own system prompt", None), ("another system prompt", OTHER_SYSTEM)):
        messages = [{"role": "system", "content": system}] * bool(system) + DIALOGUE
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template's own code: gemma's raises at a system message
            return f"it refuses {name}: {error}"
        ids = without_bos(tokenizer.encode(text, add_special_tokens=False), tokenizer)
        if ids != reference_ids(tokenizer, template, system):
            return f"another prompt than in training, with {name}"
    return None


def modelfile_difference(text: str, tokenizer, template) -> str | None:
    """Say how a Modelfile differs from LLaMA-Factory's prompt and stop words; None if it doesn't."""
    parts = parse_modelfile(text)
    if parts["SYSTEM"] != (template.default_system or None):
        return f"SYSTEM is {parts['SYSTEM']!r}"
    stops = {tokenizer.convert_ids_to_tokens(token) for token in template.get_stop_token_ids(tokenizer)}
    if parts["stop"] != stops:
        return f"the stop words are {sorted(parts['stop'])}, must be {sorted(stops)}"
    bos = tokenizer.bos_token
    if bos and parts["TEMPLATE"].startswith(bos):
        return f"{bos} in the template, which Ollama adds itself"
    for system in filter(None, (template.default_system, OTHER_SYSTEM)):
        prompt = render_ollama(parts["TEMPLATE"], system, DIALOGUE)
        if tokenizer.encode(prompt, add_special_tokens=False) != reference_ids(tokenizer, template, system):
            return "another prompt than in training"
    return None


def parse_modelfile(text: str) -> dict[str, Any]:
    """Return a Modelfile's TEMPLATE, SYSTEM (None without one) and set of stop words."""
    long = dict(re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', text, re.DOTALL | re.MULTILINE))
    stops = set(re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE))
    return {"TEMPLATE": long.get("TEMPLATE", ""), "SYSTEM": long.get("SYSTEM"), "stop": stops}


# Go's text/template to Jinja, for the forms that these Modelfiles have
GO_FORMS = {
    "if .System": "{% if System %}",
    "range .Messages": "{% for message in Messages %}",
    'if eq .Role "user"': "{% if message.role == 'user' %}",
    'else if eq .Role "assistant"': "{% elif message.role == 'assistant' %}",
    ".System": "{{ System }}",
    ".Content": "{{ message.content }}",
    "$system := .System": "{% set first = namespace(system=System) %}",
    "if $system": "{% if first.system %}",
    "$system": "{{ first.system }}",
    '$system = ""': "{% set first.system = '' %}",
}


def render_ollama(go_template: str, system: str, messages: list[dict[str, str]]) -> str:
    """Return the prompt that Ollama makes: as there, the system prompt is `.System` and also the first message."""
    import jinja2

    pieces, blocks = [], []
    for text, action in re.findall(r"(.*?)(?:\{\{ (.*?) \}\}|\Z)", go_template, re.DOTALL):
        pieces.append(f"{{% raw %}}{text}{{% endraw %}}" if text else "")
        if action == "end":
            pieces.append(f"{{% end{blocks.pop()} %}}")
        elif action:
            if action not in GO_FORMS:
                raise CheckFailed(f"the Modelfile's template has a form that isn't known here: {action}")
            pieces.append(GO_FORMS[action])
            blocks += {"if": ["if"], "range": ["for"]}.get(action.split()[0], [])
    template = jinja2.Environment(keep_trailing_newline=True).from_string("".join(pieces))
    return template.render(System=system, Messages=[{"role": "system", "content": system}, *messages])


def write_modelfile(tokenizer, template) -> str:
    """Return a Modelfile of LLaMA-Factory's template: no begin token, and the system prompt where the template has it."""
    from llamafactory.data.template import Llama2Template

    def convert(formatter, placeholder: str) -> str:
        return template._convert_slots_to_ollama(formatter.apply(), tokenizer, placeholder=placeholder)

    user, answer = convert(template.format_user, ".Content"), convert(template.format_assistant, ".Content")
    if isinstance(template, Llama2Template):  # the system prompt begins the first question
        opening = "{{ $system := .System }}"
        first = f'{{{{ if $system }}}}{convert(template.format_system, "$system")}{{{{ $system = "" }}}}{{{{ end }}}}'
        user = user.replace("{{ .Content }}", first + "{{ .Content }}")
    else:
        opening = f"{{{{ if .System }}}}{convert(template.format_system, '.System')}{{{{ end }}}}"
    body = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
    stops = sorted(tokenizer.convert_ids_to_tokens(token) for token in template.get_stop_token_ids(tokenizer))
    lines = [
        "# written by medasst export: LLaMA-Factory's own Modelfile gave another prompt than the training's\n",
        f'FROM .\n\nTEMPLATE """{opening}{{{{ range .Messages }}}}{body}{{{{ end }}}}"""\n',
        f'SYSTEM """{template.default_system}"""\n' if template.default_system else "",
        *(f'PARAMETER stop "{stop}"' for stop in stops),
        "PARAMETER num_ctx 4096",
    ]
    return "\n".join(lines) + "\n"
