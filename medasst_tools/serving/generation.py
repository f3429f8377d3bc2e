"""One answer of LLaMA-Factory's chat engine, piece by piece, which ends when nobody reads on.

Prompt and settings are as LLaMA-Factory makes them (its version is pinned, and a test compares the answers). Its own
streams aren't used: nothing ends their thread, no client that hangs up and no time limit, and where it fails, the reader
waits for the next word for ever.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any


class Generation:
    """An answer to `turns` ({role, content}, a system prompt first or none) with `settings` over the experiment's.

    `prompt_tokens` is known at once, the answer's `ids` when its pieces have come, or reading them has ended; `whole` says
    whether they all have.
    """

    def __init__(self, engine, turns: list[dict[str, str]], **settings: Any) -> None:
        self.engine, self.ids, self.whole = engine, [], False
        system = turns[0]["content"] if turns[0]["role"] == "system" else None
        self.inputs, self.prompt_tokens = engine._process_args(
            engine.model,
            engine.tokenizer,
            engine.processor,
            engine.template,
            engine.generating_args,
            turns if system is None else turns[1:],
            system,
            input_kwargs=settings,
        )
        self.config = self.inputs["generation_config"]
        self.decoding = {"skip_special_tokens": getattr(self.config, "skip_special_tokens", True)}

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Yield the text as it comes. Closed early, it returns when the thread has ended, after the token that it is at."""
        import torch
        from transformers import AsyncTextIteratorStreamer, StoppingCriteriaList

        streamer = AsyncTextIteratorStreamer(self.engine.tokenizer, skip_prompt=True, **self.decoding)
        closed = threading.Event()

        def must_stop(input_ids, scores, **_):
            return torch.full((len(input_ids),), closed.is_set(), device=input_ids.device)

        def generate():
            try:
                stopping = StoppingCriteriaList([must_stop])
                output = self.engine.model.generate(**self.inputs, streamer=streamer, stopping_criteria=stopping)
                self.ids = output[0, self.prompt_tokens :].tolist()
            finally:
                streamer.on_finalized_text("", stream_end=True)  # after a failure its reader would wait for ever

        thread = asyncio.ensure_future(asyncio.to_thread(generate))
        try:
            async for piece in streamer:
                if piece:
                    yield piece
            await asyncio.shield(thread)
            self.whole = True
        finally:
            closed.set()
            await asyncio.wait([thread])

    @property
    def text(self) -> str:
        """The whole answer as LLaMA-Factory decodes it."""
        return self.engine.tokenizer.decode(self.ids, clean_up_tokenization_spaces=True, **self.decoding)

    @property
    def was_cut(self) -> bool:
        """Whether max_new_tokens ended it."""
        return self.whole and self.ids[-1] not in self.config.eos_token_id


async def before_stop(pieces: AsyncIterator[str], stops: list[str]) -> AsyncIterator[str]:
    """Yield the text up to the first stop text; what may be the beginning of one is held back."""
    held = ""
    async for piece in pieces:
        held += piece
        if found := [place for stop in stops if (place := held.find(stop)) >= 0]:
            yield held[: min(found)]
            return
        begun = [n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])]
        shown = len(held) - max(begun, default=0)
        yield held[:shown]
        held = held[shown:]
    yield held
