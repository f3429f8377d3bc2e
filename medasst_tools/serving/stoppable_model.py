"""Generation that can be stopped and whose failure is seen, around the model in LLaMA-Factory's chat engine.

LLaMA-Factory generates in a thread that nothing ends: not a client that hangs up, not a time limit. And where a streamed
answer's generation fails, nobody tells the reader, which waits for the next word for ever.
"""

import asyncio
import logging
import threading
from contextvars import ContextVar

from medasst_tools.serving.api_requests import Refused

logger = logging.getLogger("uvicorn.error")
CURRENT: ContextVar["Generation"] = ContextVar("generation")  # the request's, wherever its task asks for it


class Generation:
    """One request's generation: why it must end or has failed, whether max_tokens cut it, and when its thread is idle."""

    def __init__(self) -> None:
        self.failure: Refused | None = None
        self.cut = False
        self.idle = threading.Event()
        self.idle.set()

    def stop(self, reason: Refused) -> None:
        """Let the generation end after the token that it is at; the first reason counts."""
        self.failure = self.failure or reason

    async def ended(self) -> None:
        """Wait for the thread."""
        if not self.idle.is_set():
            await asyncio.to_thread(self.idle.wait)


class StoppableModel:
    """The model itself, but for `generate`, which the engine asks for in the context of the request that it is for."""

    def __init__(self, model) -> None:
        self._model = model

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    @property
    def generate(self):
        """The model's generate, bound to the current request: the engine calls it in a thread that has no context."""
        generation = CURRENT.get()
        return lambda **settings: self._generate(generation, **settings)

    def _generate(self, generation: Generation, streamer=None, **settings):
        import torch
        from transformers import StoppingCriteriaList

        ends = settings["generation_config"].eos_token_id

        def must_stop(input_ids, scores, **_):
            # after each token, and so before the streamer ends: the answer's last part says why it ended
            generation.cut = input_ids[0, -1].item() not in ends
            return torch.full((len(input_ids),), generation.failure is not None, device=input_ids.device)

        generation.idle.clear()
        try:
            if generation.failure:
                raise InterruptedError  # before the first token
            return self._model.generate(
                streamer=streamer, stopping_criteria=StoppingCriteriaList([must_stop]), **settings
            )
        except Exception as error:
            if not generation.failure:
                logger.exception("generation failed")
            generation.stop(Refused(500, f"The generation failed ({type(error).__name__})", code="generation_failed"))
            if streamer is None:
                raise
            streamer.on_finalized_text("", stream_end=True)  # its reader would wait for ever
        finally:
            generation.idle.set()
