"""Chat through the OpenAI SDK: streamed, with the figures Paceline adds to the usage.

PACELINE_URL=http://localhost:8000 python docs/examples/openai_sdk.py
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("PACELINE_URL", "http://localhost:8000") + "/v1",
    api_key=os.environ.get("PACELINE_API_KEY", "not needed without tenants"),
)
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Why do riders draft each other?"}],
    max_tokens=48,
    temperature=0.8,
    seed=7,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        figures = chunk.model_dump()
        print("\n\nusage:", figures["usage"])
        print("speculation:", figures["metrics"].get("speculative_decoding"))
