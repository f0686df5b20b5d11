"""The private and young parts of Ray Serve that ``deployments.serve_compat`` builds on."""

from __future__ import annotations

import inspect

import grpc
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, TaskCancelledError
from ray.serve._private import constants
from ray.serve._private import replica as replica_module
from ray.serve._private.autoscaling_state import ApplicationAutoscalingState
from ray.serve._private.common import ReplicaQueueLengthInfo, RequestMetadata
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import ReplicaSelection, RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter
from ray.serve._private.router import AsyncioRouter
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingContext
from ray.serve.exceptions import (
    BackPressureError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ServeApplicationSchema

from deployments import serve_compat
from deployments.direct_replica import DirectReplica, DirectResult
from deployments.draft import DraftReplica
from deployments.engine.errors import EngineDeadError, EngineDrainingError, EngineOverloadedError
from deployments.ingress import IngressReplica
from deployments.routing import PrefixAwareRouter
from deployments.target import TargetReplica


def test_the_router_overrides_what_the_base_class_calls() -> None:
    for name in (
        "choose_replicas",
        "on_request_routed",
        "initialize_state",
        "_get_pending_request_matching_internal_request_id",
        "_choose_replica_for_request",
        "create_replica_wrapper",
    ):
        base = inspect.signature(getattr(RequestRouter, name))
        own = inspect.signature(getattr(PrefixAwareRouter, name))
        if name != "initialize_state":
            assert list(own.parameters) == list(base.parameters), name
    source = inspect.getsource(RequestRouter)
    assert "self._get_pending_request_matching_internal_request_id(request_metadata)" in source
    assert "self._pending_requests_to_fulfill" in source
    # What a call that is routed at once reads and records.
    assert "_record_queue_wait_time" in vars(RequestRouter)
    assert "self._replica_queue_len_cache.get(r.replica_id)" in source
    assert "self._replicas_list" in source


def test_a_pending_request_carries_arguments_and_its_arrival() -> None:
    fields = PendingRequest.__dataclass_fields__
    assert {"args", "metadata", "created_at", "future", "routing_context"} <= set(fields)
    assert "internal_request_id" in RequestMetadata.__dataclass_fields__


def test_handles_choose_replicas_that_publish_metadata() -> None:
    assert callable(DeploymentHandle.choose_replica)
    assert callable(DeploymentResponseGenerator.cancel)
    assert {"replica_id", "replica_metadata"} <= set(ReplicaSelection.__dataclass_fields__)
    assert constants.RECORD_REPLICA_METADATA_METHOD == "record_replica_metadata"
    assert callable(getattr(DraftReplica, constants.RECORD_REPLICA_METADATA_METHOD))


def test_a_replica_s_results_can_be_our_own() -> None:
    for name in ("try_send_request", "get_queue_len"):
        base = inspect.signature(getattr(RunningReplica, name))
        own = inspect.signature(getattr(DirectReplica, name))
        assert list(own.parameters) == list(base.parameters), name
    assert not DirectResult.__abstractmethods__
    assert ReplicaResult.__abstractmethods__ >= {"get_rejection_response", "cancel", "__anext__"}
    assert "_on_separate_loop" in RequestMetadata.__dataclass_fields__
    assert {"accepted", "num_ongoing_requests"} <= set(ReplicaQueueLengthInfo.__dataclass_fields__)
    source = inspect.getsource(AsyncioRouter)
    assert "with_rejection=with_rejection" in source
    assert "await result.get_rejection_response()" in source
    assert callable(getattr(TargetReplica, constants.RECORD_REPLICA_METADATA_METHOD))


def test_the_ingress_builds_its_own_application() -> None:
    assert replica_module.SERVE_BUILD_ASGI_APP_METHOD == "__serve_build_asgi_app__"
    assert callable(getattr(IngressReplica, replica_module.SERVE_BUILD_ASGI_APP_METHOD))


def test_replicas_tell_routers_of_themselves() -> None:
    assert constants.REQUEST_ROUTING_STATS_METHOD == "record_routing_stats"
    assert callable(getattr(TargetReplica, constants.REQUEST_ROUTING_STATS_METHOD))
    assert isinstance(serve_compat.RunningReplica.routing_stats, property)


def _rpc_error(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ActorDiedError(), True),
        (ActorUnavailableError("gone", None), True),
        (ReplicaUnavailableError("r"), True),
        (EngineDeadError("dead"), True),
        (EngineDrainingError("draining"), True),
        (_rpc_error(grpc.StatusCode.UNAVAILABLE), True),
        (_rpc_error(grpc.StatusCode.CANCELLED), True),
        (_rpc_error(grpc.StatusCode.INVALID_ARGUMENT), False),
        (RequestCancelledError("r"), False),
        (TaskCancelledError(), False),
        (EngineOverloadedError("full"), False),
        (KeyError("bug"), False),
    ],
    ids=repr,
)
def test_which_errors_mean_that_a_replica_is_gone(error: BaseException, *, lost: bool) -> None:
    assert serve_compat.is_replica_lost(error) is lost


def test_refusals_and_cancellations_are_told_apart() -> None:
    assert serve_compat.is_queue_full(BackPressureError(1, 1))
    assert serve_compat.is_cancelled(RequestCancelledError("r"))
    assert not serve_compat.is_cancelled(BackPressureError(1, 1))


def test_applications_have_one_policy_that_is_told_of_all_deployments() -> None:
    assert "autoscaling_policy" in ServeApplicationSchema.model_fields
    source = inspect.getsource(ApplicationAutoscalingState.get_decision_num_replicas)
    assert "self._policy(" in source
    # What is not decided is left as it is; so the policy keeps a pool empty.
    assert "for deployment_id, num_replicas in decisions.items()" in source
    wrapper = inspect.getsource(_apply_app_level_autoscaling_config)
    assert wrapper.index("not in desired_num_replicas_dict") < wrapper.index("_get_cold_start")
    names = inspect.signature(AutoscalingContext).parameters
    assert {
        "current_num_replicas",
        "target_num_replicas",
        "total_num_requests",
        "total_queued_requests",
        "raw_metrics",
    } <= set(names)
    for replica in (TargetReplica, DraftReplica):
        assert callable(replica.record_autoscaling_stats)
    assert '"record_autoscaling_stats"' in inspect.getsource(replica_module)
