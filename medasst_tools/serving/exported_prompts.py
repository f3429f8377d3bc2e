"""An exported model carries the prompt that it was trained with, in the files that other servers read.

vLLM and SGLang read chat_template.jinja, Ollama the Modelfile, and both stop where generation_config.json says. The chat
template is rendered over a dialogue of two turns, without and with another system prompt, and must give the token ids that
LLaMA-Factory trains on; the Modelfile is written from the same template (the tests run it through Go's text/template).
"""

import json
from pathlib import Path
from typing import Any

from medasst_tools.errors import CheckFailed
from medasst_tools.files import write_json

DIALOGUE = [
    {"role": "user", "content": "孩子发烧 38.5 度怎么办？"},
    {"role": "assistant", "content": "先量体温、多喝水；\n精神差请就医。"},
    {"role": "user", "content": "能吃 “退烧药” 吗？"},
]
OTHER_SYSTEM = "请简短回答。"
# Ollama's own defaults are temperature 0.8 and a repeat penalty of 1.1; ours is greedy, as in chat.yaml
GREEDY = "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"


def correct_prompts(folder: Path, chat: dict[str, Any]) -> list[str]:
    """Make the exported folder's prompt files those of `chat` (template, system prompt, enable_thinking).

    Return a line for each correction of what the base released. CheckFailed if no chat template gives the training's prompt.
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
        corrections.append(f"chat_template.jinja: {difference}")
        if difference := chat_template_difference(tokenizer, template):
            raise CheckFailed(
                f"{chat['template']}: no chat template of LLaMA-Factory's gives its prompt ({difference})"
            )
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        _without_older_template(folder / "tokenizer_config.json")
    stops = sorted(set(template.get_stop_token_ids(tokenizer)) | {tokenizer.eos_token_id})
    if line := _stop_at(folder / "generation_config.json", stops):
        corrections.append(line)
    (folder / "Modelfile").write_text(write_modelfile(tokenizer, template) + GREEDY, encoding="utf-8")
    return corrections


def _without_older_template(path: Path) -> None:
    """Older readers look into tokenizer_config.json first."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("chat_template", None):
        write_json(path, config)


def _stop_at(path: Path, stops: list[int]) -> str | None:
    """Let generation_config.json end an answer where the training's answers end; return what was wrong, None if nothing."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = config.get("eos_token_id")
    if set(before if isinstance(before, list) else [before]) >= set(stops):
        return None
    write_json(path, config | {"eos_token_id": stops})
    return f"generation_config.json: eos_token_id {before} -> {stops}"


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
        "# written by medasst export from LLaMA-Factory's template\n",
        f'FROM .\n\nTEMPLATE """{opening}{{{{ range .Messages }}}}{body}{{{{ end }}}}"""\n',
        f'SYSTEM """{template.default_system}"""\n' if template.default_system else "",
        *(f'PARAMETER stop "{stop}"' for stop in stops),
        "PARAMETER num_ctx 4096",
    ]
    return "\n".join(lines) + "\n"
