"""The gRPC services that the ingress answers, as Serve wants to hear of them."""

GRPC_SERVICERS = (
    "protos.inference_pb2_grpc.add_InferenceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
"""For ``gRPCOptions.grpc_servicer_functions``; Serve calls the ingress's methods by RPC name.

Kept apart from the ingress: whoever starts Serve needs it before Ray may be imported.
"""
