"""The console script `medasst`: one verb a module, and the only place where an error becomes a line and a status.

A verb's module has `add_arguments(parser)` and `run(args)`, and imports nothing heavy at its top level. Only the module
of the verb that was typed is imported, so that `medasst --help` answers at once.
"""

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import MutableMapping

from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.language import said, word

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PROXIES = ("all_proxy", "http_proxy", "https_proxy")
# {verb: (its module in medasst_tools, what it is for)}
VERBS = {
    "doctor": ("machine.doctor", "versions, extras, GPU, disk, hub; what an experiment needs and whether it is here"),
    "download": ("data.download", "corpora, exams or models from ModelScope or Hugging Face"),
    "convert": ("data.convert", "raw corpora to a LLaMA-Factory dataset_dir, every record accounted for"),
    "add-corpus": ("data.add_corpus", "a corpus of one's own into dataset_info/own.yaml, shown as it will be"),
    "audit": ("data.audit", "duplicates, test questions in training, lengths, personal data"),
    "render": ("render", "factory_configs/experiments.yaml to LLaMA-Factory configs"),
    "tiny-model": ("training.tiny_model", "a tiny random Qwen2 with its own tokenizer, for the demo and the tests"),
    "released-model": ("training.released_model", "SmolLM2-135M-Instruct out of a package: a released model, no hub"),
    "train": ("training.train", "a train.yaml through llamafactory-cli: goes on if killed, done once if finished"),
    "predict": ("inference.predict", "the test sets, through LLaMA-Factory or an OpenAI-style endpoint; goes on if killed"),
    "score": ("evaluation.score", "BLEU-4 and ROUGE of LLaMA-Factory's generated_predictions.jsonl"),
    "exam": ("evaluation.exam", "CMMLU and C-Eval medical questions by the probabilities of A, B, C, D"),
    "api": ("serving.api", "an OpenAI-style server behind checks and limits, on this machine only"),
    "compare": ("evaluation.compare", "two experiments on the same records: is one better, and how sure is that"),
    "judge": ("evaluation.judge", "a judge model's verdicts on two experiments' answers, with its bias beside them"),
    "chat": ("serving.chat", "the chat page or terminal chat, with our notice and safe defaults"),
    "export": ("serving.export", "an adapter merged into its base, with a model card and a checked Modelfile"),
    "safety": ("evaluation.safety", "what a model says to red flags, false premises, requests for prescriptions"),
    "report": ("report.page", "everything in results/ beside the paper's tables"),
    "steps": ("steps", "what a target of the Makefile stands for: an experiment's verbs in their order"),
}  # fmt: skip


def import_verb(verb: str):
    """Return the verb's module, imported only now."""
    return importlib.import_module(f"medasst_tools.{VERBS[verb][0]}")


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """Return the parser; only `verb` gets its own arguments, the others are listed by name."""
    parser = argparse.ArgumentParser(
        prog="medasst", description="Data, configs, scores and the report around LLaMA-Factory."
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (_, help_line) in VERBS.items():
        subparser = verbs.add_parser(name, help=help_line, description=help_line)
        if name == verb:
            import_verb(name).add_arguments(subparser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the parsed command line; `key=value` overrides may also stand behind options, where argparse alone loses them."""
    verb = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(verb if verb in VERBS else None)
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all(re.match(r"[A-Za-z_][\w.]*=", word) for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def fit_proxies(environment: MutableMapping[str, str]) -> None:
    """Keep loopback out of proxies, and call what desktops set (socks://) by the name that clients know, socks5://."""
    for name in ("NO_PROXY", "no_proxy"):
        words = [word for word in environment.get(name, "").split(",") if word]
        environment[name] = ",".join(dict.fromkeys([*words, *LOOPBACK]))
    for name in (*PROXIES, *map(str.upper, PROXIES)):
        if (value := environment.get(name, "")).startswith("socks://"):
            environment[name] = value.replace("socks://", "socks5://", 1)


def main(argv: list[str] | None = None) -> int:
    """Run the verb that was typed and return its exit status.

    0 done, 1 a check failed, 2 a user's mistake, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    # torch's threads otherwise spin while they wait: beside other work two cores train at less than half the speed
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("USER", str(os.getuid()))  # torch asks for a name, which a container's user id needn't have
    fit_proxies(os.environ)
    return run_verb(parse(argv))


def run_verb(args: argparse.Namespace) -> int:
    """Run one verb and return its exit status; an error becomes a line."""
    try:
        for name in ("limit", "workers"):
            if (count := getattr(args, name, None)) is not None and count < 1:
                raise UserError(f"--{name} is {count}, must be 1 or more")
        return import_verb(args.verb).run(args) or 0
    except CheckFailed as failed:
        print(f"medasst {args.verb}: {said(str(failed))}", file=sys.stderr)
        return 1
    except UserError as error:
        for line in said(str(error)).split("\n"):
            print(f"medasst {args.verb}: {word('error')}: {line}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `medasst doctor | head`: who read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        # a full disk, a folder without permission, a file that went away: the system's words name the path
        words = ": ".join(filter(None, (error.strerror or str(error), error.filename)))
        print(f"medasst {args.verb}: {word('error')}: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        words = said("interrupted; the same command goes on or starts again")
        print(f"medasst {args.verb}: {words}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
