"""Ask a judge model which of two answers is better, by a rubric: correctness, safety, completeness, referral, tone.

Run: `medasst judge medasst qwen2_7b --api-base URL --model NAME`; without a second experiment the references are the other.

evalscope asks and reads. Each pair is judged in both orders, each order twice, so that no number stands without the judge's name,
its leaning to the answer that stands first, and its agreement with itself.
"""

import argparse
import importlib.util
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from medasst_tools import provenance
from medasst_tools.errors import UserError
from medasst_tools.evaluation import statistics
from medasst_tools.evaluation.compare import results_of, same_references
from medasst_tools.evaluation.score import interval
from medasst_tools.files import PROJECT_ROOT, write_json, write_jsonl
from medasst_tools.inference import endpoint
from medasst_tools.inference.answers import AnswerStore

RUBRIC = PROJECT_ROOT / "templates" / "judge_zh.txt"
ASPECTS = ("correctness", "safety", "completeness", "referral", "tone", "overall")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("a", type=results_of, metavar="A", help="medasst, or its folder results/medasst")
    parser.add_argument("b", type=results_of, metavar="B", nargs="?", help="the other experiment (A's references)")
    parser.add_argument("--api-base", required=True, metavar="URL", help="the judge's; the key comes from API_KEY")
    parser.add_argument("--model", help="the judge (the only model that the endpoint has)")
    parser.add_argument("--limit", type=int, help="only N records, drawn with seed 42; each is asked four times")
    parser.set_defaults(concurrency=8, timeout=600.0)


def run(args: argparse.Namespace) -> None:
    """Ask for every verdict that isn't there yet; write judge.jsonl and judge.json beside A's answers."""
    if importlib.util.find_spec("evalscope") is None:
        raise UserError("evalscope isn't installed; `make setup EXTRAS=judge` installs it")
    both = same_references(args.a, args.b or args.a)
    pairs = [(a.prompt, a.predict, b.predict if args.b else b.label) for a, b in both]
    if args.limit and args.limit < len(pairs):
        pairs = random.Random(statistics.SEED).sample(pairs, args.limit)
    files = {"answers": provenance.short(pairs), "rubric": provenance.sha256_of(RUBRIC)}
    about = provenance.made_of(endpoint.asked_of(args), files, versions=provenance.package_versions("evalscope"))
    out = args.a / "judge.json"
    if provenance.up_to_date(out, about):
        return
    api_key = endpoint.key_of_environment() or "none"
    name = endpoint.find_model(args.api_base, api_key, args.model)
    store = AnswerStore(args.a / "answers" / "judge.jsonl")
    keys = [store.key(args.api_base, name, files["rubric"], pair) for pair in pairs]
    missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in store}
    store.fill(len(missing), len(keys), ask_all(missing, args, name, api_key), args.a / "judge.log", "pair")
    rows = [{"prompt": prompt, "a": a, "b": b} | store[key] for key, (prompt, a, b) in zip(keys, pairs, strict=True)]
    write_jsonl(out.with_suffix(".jsonl"), rows)
    said = {"judge": name, "a": str(args.a), "b": str(args.b or "references")}
    report = statistics.judged(rows, ASPECTS)
    write_json(out, said | report | provenance.record(out, about, [out.with_suffix(".jsonl")]))
    print(f"judge {name}; a = {said['a']}, b = {said['b']}; {report['signature']}")
    for aspect, row in report["aspects"].items():
        preferred, leaning = (f"{row[key]:+7.2f} {interval(row['ci95'][key])}" for key in ("difference", "position"))
        agrees = f"asked again {row['again']:.1f} %, in the other order {row['other_order']:.1f} %; n {report['n']}"
        print(f"{aspect:12} a - b {preferred}; first - second {leaning}; agrees with itself: {agrees}")


def ask_all(pairs: dict[str, tuple], args: argparse.Namespace, name: str, api_key: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, {"original" and "swapped": verdicts, "unreadable": reasons}) in order; UserError if it can't be asked."""
    import openai
    from evalscope.api.judge import OutputContract
    from evalscope.api.messages import ChatMessageUser
    from evalscope.metrics.judge import LLMJudge
    from pydantic import create_model

    fields: Any = dict.fromkeys(ASPECTS, (Literal["first", "second", "tie"], ...))
    contract = OutputContract(schema_model=create_model("Verdict", **fields))
    judge = LLMJudge(
        api_key, args.api_base, name, prompt_template=RUBRIC.read_text(encoding="utf-8"),
        generation_config={"temperature": 0.0, "retries": 1},  # the client's own retries wait longer each time
        model_args={"max_retries": endpoint.RETRIES, "timeout": args.timeout},
    )  # fmt: skip

    def ask(prompt: str, a: str, b: str) -> dict[str, list]:
        found: dict[str, list] = {"original": [], "swapped": [], "unreadable": []}
        for order, first, second in (("original", a, b), ("swapped", b, a)) * 2:
            text = judge.build_prompt(first, second, prompt) + contract.instruction()
            try:
                read = contract.parse(judge.generate([ChatMessageUser(content=text)]).completion)
            except openai.OpenAIError as error:
                raise endpoint.given_up(error, args.api_base, api_key) from None
            found[order if read.ok else "unreadable"].append(read.value.model_dump() if read.ok else read.error)
        return found

    with ThreadPoolExecutor(args.concurrency) as pool:
        yield from zip(pairs, pool.map(ask, *zip(*pairs.values(), strict=True)), strict=True)
