"""A shop's customer asks about a medicine: a conversation of three turns, each answer shown while it is made.

Run: `make api`, then in another terminal `.venv/bin/python examples/shop_chat.py`. Another address is its argument
(`http://HOST:PORT/v1`); the key, if the server has one, is API_KEY.

The system prompt is the experiment's own, which the server puts in. A shop adds what it knows for sure, such as a
medicine's leaflet, to the question; and it shows that no doctor is answering.
"""

import os
import sys

import openai

QUESTIONS = [
    "您好，我在你们店里买了布洛芬缓释胶囊，说明书上说饭后吃，一天最多吃几次？",
    "我妈妈六十八岁，有高血压，正在吃降压药，她也能吃吗？",
    "她今天吃了以后胸口疼，还出冷汗，怎么办？",
]
NOTICE = "以上由模型生成，可能有错，不是医生的建议。胸痛、呼吸困难等急症请拨打 120。"


def main(base: str) -> None:
    """Ask the questions one after the other, each with the conversation so far."""
    client = openai.OpenAI(base_url=base, api_key=os.environ.get("API_KEY") or "none")
    model = next(iter(client.models.list())).id
    messages = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        print(f"顾客：{question}\n助手：", end="")
        answer = ""
        for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
            part = chunk.choices[0].delta.content or ""
            print(part, end="", flush=True)
            answer += part
        print()
        messages.append({"role": "assistant", "content": answer})
    print(NOTICE)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:] or ["http://127.0.0.1:8000/v1"])
    except openai.OpenAIError as error:  # the server is away, the key is wrong, the queue is full
        sys.exit(f"the server gave no answer: {error}")
