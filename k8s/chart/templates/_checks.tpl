{{/* What no schema can say: values that fit alone and not together. Renders nothing. */}}
{{- define "paceline.checks" -}}
{{- range $pool := include "paceline.pools" . | splitList " " -}}
{{- $pods := index $.Values.pools $pool -}}
{{- if gt (int $pods.minPods) (int $pods.maxPods) -}}
{{- fail (printf "pools.%s.minPods is above its maxPods" $pool) -}}
{{- end -}}
{{- $resources := keys $pods.resources.limits | join " " -}}
{{- if and (index $.Values.config.pools $pool "num_gpus" | default 0 | float64) (not (contains "gpu" $resources)) -}}
{{- fail (printf "config.pools.%s.num_gpus needs a GPU in pools.%s.resources.limits, such as nvidia.com/gpu" $pool $pool) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.config.pools.prefill (not (include "paceline.hasValkey" .)) -}}
{{- fail "config.pools.prefill hands pages over through Valkey: enable valkey or set externalValkey" -}}
{{- end -}}
{{- $ports := list .Values.serve.httpPort .Values.serve.grpcPort -}}
{{- if include "paceline.hasTls" (list . "surfaces") -}}
{{- $ports = concat $ports (list .Values.tls.httpPort .Values.tls.grpcPort) -}}
{{- end -}}
{{- if ne (len $ports) (len (uniq $ports)) -}}
{{- fail "serve.httpPort, serve.grpcPort and the ports of tls must all differ" -}}
{{- end -}}
{{- with .Values.ray.gcsFaultTolerance -}}
{{- if and .existingSecret (not .address) -}}
{{- fail "ray.gcsFaultTolerance.existingSecret is of a server of yours: set its address as well" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.auth.encryptPages (not (include "paceline.sharesPages" .)) -}}
{{- fail "auth.encryptPages has nothing to seal while config.kv is null" -}}
{{- end -}}
{{- if and .Values.valkey.enabled .Values.externalValkey.existingSecret -}}
{{- fail "externalValkey is not used while valkey.enabled is true" -}}
{{- end -}}
{{- end -}}
