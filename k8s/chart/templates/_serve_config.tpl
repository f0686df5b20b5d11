{{/*
The pools that have pods, separated by spaces: each is a worker group, and labels, policies, monitors
and scaling follow from this list.
*/}}
{{- define "paceline.pools" -}}
{{- $pools := list -}}
{{- range $name := list "ingress" "target" "prefill" "draft" -}}
{{- if index $.Values.config.pools $name -}}
{{- $pools = append $pools $name -}}
{{- end -}}
{{- end -}}
{{- join " " $pools -}}
{{- end -}}

{{/*
The arguments of cluster.app:build_app: the values' configuration, bound to this release's nodes.
Explicit nulls keep build_app from giving a release without a draft pool or shared pages the default
ones.
*/}}
{{- define "paceline.clusterConfig" -}}
{{- $config := deepCopy .Values.config -}}
{{- range $pool := include "paceline.pools" . | splitList " " -}}
{{- $_ := set (index $config.pools $pool) "labels" (dict "paceline.io/pool" $pool) -}}
{{- end -}}
{{- if not $config.pools.draft -}}
{{- $_ := set $config.pools "draft" nil -}}
{{- end -}}
{{- if not (include "paceline.sharesPages" .) -}}
{{- $_ := set $config "kv" nil -}}
{{- end -}}
{{- if include "paceline.hasTls" (list . "drafts") -}}
{{- $folder := include "paceline.tlsFolder" . -}}
{{- $tls := dict "server_name" (include "paceline.fullname" .) -}}
{{- range $setting, $file := dict "certificate_file" "tls.crt" "key_file" "tls.key" "ca_file" "ca.crt" -}}
{{- $_ := set $tls $setting (printf "%s/%s" $folder $file) -}}
{{- end -}}
{{- $config = merge $config (dict "engine" (dict "speculation" (dict "pool_tls" $tls))) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* What Ray Serve deploys. */}}
{{- define "paceline.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ .Values.serve.httpPort }}
grpc_options:
  port: {{ .Values.serve.grpcPort }}
  grpc_servicer_functions:
    - protos.inference_pb2_grpc.add_InferenceServicer_to_server
    - grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server
logging_config:
  log_level: {{ default "INFO" .Values.config.log_level }}
  encoding: JSON
applications:
  - name: {{ default "paceline" .Values.config.app_name }}
    route_prefix: /
    import_path: cluster.app:build_app
    args:
      {{- include "paceline.clusterConfig" . | nindent 6 }}
    {{- with include "paceline.scaledPools" . | fromYaml }}
    autoscaling_policy:
      policy_function: cluster.scaling.serve_policy:JointPolicy
      policy_kwargs:
        pools:
          {{- toYaml . | nindent 10 }}
        scaling:
          {{- toYaml (default dict $.Values.config.scaling) | nindent 10 }}
    {{- end }}
{{- end -}}

{{- /* Pools that grow and shrink, by name: one policy sizes them together. */ -}}
{{- define "paceline.scaledPools" -}}
{{- $scaled := dict }}
{{- range $name := include "paceline.pools" . | splitList " " }}
{{- with index $.Values.config.pools $name "autoscaling" }}
{{- $_ := set $scaled $name . }}
{{- end }}
{{- end }}
{{- toYaml $scaled }}
{{- end -}}
