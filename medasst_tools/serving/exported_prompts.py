"""An exported model carries the prompt that it was trained with, in the files that other servers read.

vLLM and SGLang read chat_template.jinja, Ollama the Modelfile, and both stop where generation_config.json says. The chat
template is rendered over a dialogue of two turns, without and with another system prompt, and must give the token ids that
LLaMA-Factory trains on; the Modelfile is written from the same template (the tests run it through Go's text/template).
"""

import dataclasses
from pathlib import Path
from typing import Any

from medasst_tools.errors import CheckFailed
from medasst_tools.files import read_json, write_json

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

    released, tokenizer = (AutoTokenizer.from_pretrained(folder) for _ in range(2))
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(**chat))
    wanted = {system: reference_ids(tokenizer, template, system) for system in (None, OTHER_SYSTEM)}
    served = served_template(released, template, wanted)
    corrections = []
    if difference := chat_template_difference(released, released.chat_template, wanted):
        corrections.append(f"chat_template.jinja: {difference}")
        (folder / "chat_template.jinja").write_text(chat_template_of(served, released), encoding="utf-8")
        config = read_json(folder / "tokenizer_config.json") or {}
        if config.pop("chat_template", None):  # older readers look there first
            write_json(folder / "tokenizer_config.json", config)
    # llama3's template adds Llama 3.1's <|eom_id|> to the tokenizer: Llama 3 has no embedding for it
    known = released.get_vocab().values()
    stops = sorted(token for token in template.get_stop_token_ids(tokenizer) if token in known)
    generation = read_json(folder / "generation_config.json") or {}
    before = generation.get("eos_token_id")
    if set(stops) - set(before if isinstance(before, list) else [before]):
        corrections.append(f"generation_config.json: eos_token_id {before} -> {stops}")
        write_json(folder / "generation_config.json", generation | {"eos_token_id": stops})
    (folder / "Modelfile").write_text(write_modelfile(released, served, stops), encoding="utf-8")
    return corrections


# ---- the chat template ----------------------------------------------------------------------------------------------
def reference_ids(tokenizer, template, system: str | None) -> list[int]:
    """Return the prompt of DIALOGUE as LLaMA-Factory encodes it, without a begin token: each server adds that itself."""
    ids = template.encode_oneturn(tokenizer, [*DIALOGUE, {"role": "assistant", "content": ""}], system)[0]
    return without_bos(ids, tokenizer)


def without_bos(ids: list[int], tokenizer) -> list[int]:
    """Return the ids without the begin token at their start."""
    return ids[1:] if ids and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else ids


def chat_template_difference(tokenizer, chat_template: str | None, wanted: dict[str | None, list[int]]) -> str | None:
    """Say how a chat template's prompts differ from the training's, `wanted`: {system prompt: token ids}; None if not."""
    if not chat_template:
        return "there is none"
    for system, expected in wanted.items():
        name = "another system prompt" if system else "its own system prompt"
        messages = [{"role": "system", "content": system}] * bool(system) + DIALOGUE
        try:
            asked = tokenizer.apply_chat_template(messages, chat_template=chat_template, add_generation_prompt=True)
        except Exception as error:  # a template's own code: gemma's raises at a system message
            return f"it refuses {name}: {error}"
        if without_bos(asked["input_ids"], tokenizer) != expected:
            return f"another prompt than in training, with {name}"
    return None


def served_template(tokenizer, template, wanted: dict[str | None, list[int]]):
    """Return LLaMA-Factory's template so that its prompt, encoded at once, gives the training's token ids; CheckFailed if none.

    It is as it is, or has a space before an answer. LLaMA-Factory encodes each turn apart, and SentencePiece (Mistral's)
    puts a space before each text. A server encodes all at once: it has that space after a special token only, where
    questions begin.
    """
    answer = template.format_assistant
    spaced = dataclasses.replace(template, format_assistant=dataclasses.replace(answer, slots=[" ", *answer.slots]))
    for candidate in (template, spaced):
        difference = chat_template_difference(tokenizer, chat_template_of(candidate, tokenizer), wanted)
        if difference is None:
            return candidate
    raise CheckFailed(f"no chat template gives the prompt of the training ({difference}); not exported")


def chat_template_of(template, tokenizer) -> str:
    """Return LLaMA-Factory's chat template, with the empty thought that it leaves out."""
    thought = empty_thought(template)
    end = f"{{% if messages[-1]['role'] == 'user' %}}{{{{ '{thought}' }}}}{{% endif %}}" if thought else ""
    return template._get_jinja_template(tokenizer) + end


def empty_thought(template) -> str:
    """Return what stands before the answer of a reasoning model that was trained with `enable_thinking: false`."""
    from llamafactory.data.template import ReasoningTemplate

    return template.add_thought() if isinstance(template, ReasoningTemplate) and not template.enable_thinking else ""


# ---- the Modelfile --------------------------------------------------------------------------------------------------
def write_modelfile(tokenizer, template, stops: list[int]) -> str:
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
    if thought := empty_thought(template):
        user += f"{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{thought}{{{{ end }}}}"
    body = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
    lines = [
        "# written by medasst export from LLaMA-Factory's template\n",
        f'FROM .\n\nTEMPLATE """{opening}{{{{ range $i, $_ := .Messages }}}}{body}{{{{ end }}}}"""\n',
        f'SYSTEM """{template.default_system}"""\n' if template.default_system else "",
        *(f'PARAMETER stop "{stop}"' for stop in sorted(tokenizer.convert_ids_to_tokens(stops))),
        "PARAMETER num_ctx 4096",
    ]
    return "\n".join(lines) + "\n" + GREEDY
