"""An OpenAI-style server for an experiment, on this machine only unless it has a key.

Run: `medasst api factory_configs/demo/chat.yaml [key=value ...]`, which `make api` calls. As for `llamafactory-cli api`,
the environment sets API_HOST (here 127.0.0.1), API_PORT (8000), API_KEY, API_MODEL_NAME (the experiment's name),
API_VERBOSE (here 0: prompts are not logged) and MAX_CONCURRENT (1).

Model, prompt and generation are LLaMA-Factory's; `api_server` is what the network sees of them.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from medasst_tools import console, provenance
from medasst_tools.config import load
from medasst_tools.errors import UserError
from medasst_tools.language import said
from medasst_tools.machine import preflight
from medasst_tools.serving import address


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    preflight.add_config_arguments(parser, "chat")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait (64); more get a 429")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for one answer's generation (300)")


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    concurrent = address.number("MAX_CONCURRENT", 1, 1, 1024)
    if args.queue < 0 or args.time_limit <= 0:
        raise UserError("--queue must be 0 or more, --time-limit above 0")
    config = load_config(args.config, args.overrides)
    name = os.environ.get("API_MODEL_NAME") or args.config.resolve().parent.name
    # before the model is loaded, which takes a while
    with address.listen("API_HOST", "API_PORT", 8000, "API_KEY") as listener:
        preflight.require(config, args)
        with console.logged(Path("results") / name / "api.log") as terminal:
            import uvicorn

            app = build_app(config, name, os.environ.get("API_KEY"), concurrent, args.queue, args.time_limit)
            notice = said("This is no doctor: say so to who reads it.")
            print(f"{notice}\n{name}: {address.url(listener)}/v1", file=terminal)
            uvicorn.Server(uvicorn.Config(app, lifespan="off", timeout_graceful_shutdown=10)).run(sockets=[listener])


def load_config(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return a chat.yaml with `key=value` overrides; UserError if it can't be served."""
    config = load(path, overrides, "chat")
    provenance.check_model(config, path)
    if config.get("infer_backend", "huggingface") != "huggingface":
        raise UserError(
            f"infer_backend is {config['infer_backend']!r}, must be huggingface; for a GPU run vLLM's or SGLang's own "
            "server on the exported model (docs/api.md)"
        )
    return config


def build_app(config: dict[str, Any], name: str, key: str | None, concurrent: int, queue: int, time_limit: float):
    """Load the model and return the app."""
    from llamafactory.chat import ChatModel
    from llamafactory.extras.misc import is_env_enabled

    from medasst_tools.serving.api_server import ApiServer

    verbose = is_env_enabled("API_VERBOSE")
    return ApiServer(ChatModel(config).engine, name, key, concurrent, queue, time_limit, verbose)
