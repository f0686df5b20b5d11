{{/*
What Ray Serve deploys. The application is built by cluster.app:build_app from our configuration;
how many replicas run is set per deployment, because a changed number then leaves replicas alone
where changed args rebuild the application.
*/}}
{{- define "paceline.serveConfig" -}}
{{- $config := deepCopy .Values.config -}}
{{- $deployments := list -}}
{{- range $pool := list "ingress" "target" "draft" -}}
{{- $p := index $.Values.pools $pool -}}
{{- $actor := dict "num_cpus" $p.actor.cpus "label_selector" (dict "pool" $pool) -}}
{{- if gt (float64 $p.actor.gpus) 0.0 -}}
{{- $_ := set $actor "num_gpus" $p.actor.gpus -}}
{{- end -}}
{{- $deployments = append $deployments (dict
      "name" (index (dict "ingress" "IngressDeployment" "target" "TargetDeployment" "draft" "DraftDeployment") $pool)
      "max_ongoing_requests" $p.maxOngoingRequests
      "graceful_shutdown_timeout_s" $p.gracefulShutdownSeconds
      "ray_actor_options" $actor
      "autoscaling_config" (dict
        "min_replicas" $p.replicas.min
        "max_replicas" $p.replicas.max
        "target_ongoing_requests" $p.replicas.targetOngoingRequests)) -}}
{{- end -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ .Values.serve.httpPort }}
grpc_options:
  port: {{ .Values.serve.grpcPort }}
  grpc_servicer_functions:
    - protos.inference_pb2_grpc.add_InferenceServicer_to_server
applications:
  - name: paceline
    route_prefix: /
    import_path: cluster.app:build_app
    args:
      {{- toYaml $config | nindent 6 }}
    deployments:
      {{- toYaml $deployments | nindent 6 }}
{{- end -}}
