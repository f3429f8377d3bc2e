"""LLaMA-Factory's OpenAI-style server for an experiment, on this machine only unless it has a key.

Run: `medasst api factory_configs/demo/chat.yaml [key=value ...]`, which `make api` calls. As for `llamafactory-cli api`,
the environment sets API_HOST (here 127.0.0.1), API_PORT (8000), API_KEY, API_MODEL_NAME (the experiment's name),
API_VERBOSE (here 0: prompts are not logged) and MAX_CONCURRENT (1).

The app is theirs (`llamafactory.api.app`); in front of it stands `api_guard`, because single requests hang or kill it.
"""

import argparse
import os
import socket
from pathlib import Path
from typing import Any

from medasst_tools import console, provenance
from medasst_tools.config import load
from medasst_tools.errors import UserError
from medasst_tools.machine import preflight

QUEUE = 64
TIME_LIMIT = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("chat_config", type=Path, help="factory_configs/<experiment>/chat.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for LLaMA-Factory, over what the file says")
    parser.add_argument("--queue", type=int, default=QUEUE, help=f"requests that may wait ({QUEUE}); more get a 429")
    parser.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT, help=f"seconds for one answer's generation ({TIME_LIMIT:g})"
    )
    preflight.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from medasst_tools.serving.api_guard import LOCAL_HOSTS

    host, port = (os.environ.get("API_HOST") or LOCAL_HOSTS[0]).strip("[]"), _number("API_PORT", 8000)
    key, concurrent = os.environ.get("API_KEY"), _number("MAX_CONCURRENT", 1)
    if host not in LOCAL_HOSTS and not key:
        raise UserError(
            f"API_HOST is {host!r} and there is no API_KEY: anyone who reaches {host} could use the model; "
            "set API_KEY, or leave API_HOST out for 127.0.0.1"
        )
    if args.queue < 0 or args.time_limit <= 0 or concurrent < 1:
        raise UserError("--queue must be 0 or more, --time-limit above 0 and MAX_CONCURRENT 1 or more")
    config = load_config(args.chat_config, args.overrides)
    name = os.environ.get("API_MODEL_NAME") or args.chat_config.resolve().parent.name
    with _bind(host, port) as listener:  # before the model is loaded, which takes a while
        preflight.require(config, args)
        with console.logged(Path("results") / name / "api.log") as terminal:
            app = build_app(config, name, key, concurrent, args.queue, args.time_limit)
            address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
            print(f"This is no doctor: say so to who reads it.\n{name}: {address}", file=terminal, flush=True)
            _server(app).run(sockets=[listener])


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable) or default
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{variable} is {value!r}, must be a whole number") from None


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


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't listen on {host}:{port} ({reason}); set API_HOST and API_PORT") from None
    return listener


def build_app(
    config: dict[str, Any],
    name: str,
    key: str | None,
    concurrent: int = 1,
    queue: int = QUEUE,
    time_limit: float = TIME_LIMIT,
):
    """Load the model and return LLaMA-Factory's app behind the guard.

    LLaMA-Factory reads the rest from the environment, which is set here.
    """
    os.environ["API_MODEL_NAME"] = name
    os.environ["MAX_CONCURRENT"] = str(concurrent)
    os.environ.setdefault("API_VERBOSE", "0")

    from llamafactory.api.app import create_app
    from llamafactory.chat import ChatModel

    from medasst_tools.serving.api_guard import ApiGuard
    from medasst_tools.serving.api_requests import prompt_rules
    from medasst_tools.serving.stoppable_model import StoppableModel

    try:
        chat_model = ChatModel(config)
    except (ValueError, OSError) as error:  # a setting that it doesn't know, a model that isn't there
        raise UserError(f"LLaMA-Factory refuses the config: {' '.join(str(error).split())}") from None
    rules = prompt_rules(chat_model, name)
    chat_model.engine.model = StoppableModel(chat_model.engine.model)
    app = create_app(chat_model)
    app.user_middleware.clear()  # theirs lets every web page in the user's browser call the server
    return ApiGuard(app, rules, key, concurrent, queue, time_limit)


def _server(app):
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=10))
