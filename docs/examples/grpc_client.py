"""Streamed generation over gRPC.

PACELINE_GRPC=localhost:9000 python docs/examples/grpc_client.py
"""

import os

import grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub

metadata = [("authorization", "Bearer " + os.environ.get("PACELINE_API_KEY", "none"))]
with grpc.insecure_channel(os.environ.get("PACELINE_GRPC", "localhost:9000")) as channel:
    stub = InferenceStub(channel)
    info = stub.ModelInfo(pb.ModelInfoRequest(), metadata=metadata, timeout=10)
    print(f"{info.model}, up to {info.max_model_len} tokens")
    request = pb.GenerateRequest(
        model=info.model,
        chat=pb.ChatMessages(
            messages=[pb.ChatMessage(role="user", content="Why do riders draft each other?")]
        ),
        sampling=pb.SamplingOptions(temperature=0.8, seed=7, max_tokens=48),
    )
    chunk = pb.GenerateChunk()
    for chunk in stub.Generate(request, metadata=metadata, timeout=120):
        print(chunk.text, end="", flush=True)
    print(f"\n\n{chunk.usage.completion_tokens} tokens, {chunk.usage.cached_tokens} cached")
