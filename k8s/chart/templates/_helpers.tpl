{{- define "paceline.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* KubeRay appends up to 23 characters to a RayService's name, and DNS labels end at 63. */}}
{{- define "paceline.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "paceline.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "paceline.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/*
Not app.kubernetes.io/name: KubeRay gives its pods that label and selects the head by it.
*/}}
{{- define "paceline.selectorLabels" -}}
app.kubernetes.io/part-of: {{ include "paceline.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "paceline.labels" -}}
app.kubernetes.io/name: {{ include "paceline.name" . }}
{{ include "paceline.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "paceline.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "paceline.secretName" -}}
{{- default (include "paceline.fullname" .) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "paceline.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "paceline.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "paceline.valkeyName" -}}
{{ include "paceline.fullname" . }}-valkey
{{- end -}}

{{/* Whether pages have a hot tier outside the pods. */}}
{{- define "paceline.hasValkey" -}}
{{- if or .Values.valkey.enabled .Values.externalValkey.existingSecret -}}true{{- end -}}
{{- end -}}

{{/*
Whether pages leave their replica. Helm deletes a default that a null overrides, so here an absent
config.kv is a null one.
*/}}
{{- define "paceline.sharesPages" -}}
{{- if kindIs "map" .Values.config.kv -}}true{{- end -}}
{{- end -}}

{{/*
Environment of every Ray container, head included: Serve reads its switches on the node where a
controller, proxy or replica happens to run.
*/}}
{{- define "paceline.env" -}}
- name: RAY_SERVE_ENABLE_HA_PROXY
  value: {{ .Values.serve.haproxy | ternary "1" "0" | quote }}
- name: RAY_SERVE_THROUGHPUT_OPTIMIZED
  value: "1"
# Ray starts workers at nice 15, where any neighbour on the node starves them.
- name: RAY_worker_niceness
  value: "0"
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: PACELINE_AUTH__CLUSTER_SECRET
  valueFrom:
    secretKeyRef:
      name: {{ include "paceline.secretName" . }}
      key: cluster-secret
- name: PACELINE_AUTH__TENANTS
  valueFrom:
    secretKeyRef:
      name: {{ include "paceline.secretName" . }}
      key: tenants
{{- if .Values.valkey.enabled }}
- name: VALKEY_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "paceline.secretName" . }}
      key: valkey-password
{{- else if .Values.externalValkey.existingSecret }}
- name: VALKEY_URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.externalValkey.existingSecret }}
      key: {{ .Values.externalValkey.urlKey }}
{{- end }}
{{- if include "paceline.sharesPages" . }}
# Kubernetes puts the secret in; the rendered manifest never holds it.
- name: PACELINE_KV__TIERS
  value: {{ include "paceline.kvTiers" . | quote }}
{{- end }}
{{- end -}}

{{/* kv.tiers as one line of JSON, hot tier first. */}}
{{- define "paceline.kvTiers" -}}
{{- $tiers := list -}}
{{- if .Values.valkey.enabled -}}
{{- $url := printf "redis://:$(VALKEY_PASSWORD)@%s:%v/0" (include "paceline.valkeyName" .) .Values.valkey.port -}}
{{- $tiers = append $tiers (dict "kind" "valkey" "url" $url) -}}
{{- else if .Values.externalValkey.existingSecret -}}
{{- $tiers = append $tiers (dict "kind" "valkey" "url" "$(VALKEY_URL)") -}}
{{- end -}}
{{- if .Values.ssd.enabled -}}
{{- $tiers = append $tiers (dict "kind" "ssd" "root" "/var/lib/paceline/kv" "budget_bytes" (int64 .Values.ssd.budgetBytesPerReplica)) -}}
{{- end -}}
{{- /* Pods find each other's folders through the hot tier. */ -}}
{{- if and .Values.ssd.shared (eq (len $tiers) 2) (gt (int .Values.pools.target.maxPods) 1) -}}
{{- $tiers = append $tiers (dict "kind" "peers") -}}
{{- end -}}
{{- if not $tiers -}}
{{- $tiers = append $tiers (dict "kind" "memory") -}}
{{- end -}}
{{- toJson $tiers -}}
{{- end -}}

{{- define "paceline.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "paceline.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Placement of a pod. Argument: a values block that has nodeSelector, tolerations, affinity. */}}
{{- define "paceline.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
