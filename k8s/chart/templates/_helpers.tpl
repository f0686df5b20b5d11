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

{{- define "paceline.gcsName" -}}
{{ include "paceline.fullname" . }}-gcs
{{- end -}}

{{/* Whether the chart runs the server that keeps the state of Ray's control plane. */}}
{{- define "paceline.hasOwnGcs" -}}
{{- with .Values.ray.gcsFaultTolerance -}}
{{- if and .enabled (not .address) -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{/* All kinds of Ray pods, as a JSON list: the values of a label selector. */}}
{{- define "paceline.rayComponents" -}}
{{- prepend (splitList " " (include "paceline.pools" .)) "head" | toJson -}}
{{- end -}}

{{/* Those that read and write pages. */}}
{{- define "paceline.pageComponents" -}}
{{- $found := list -}}
{{- range $pool := include "paceline.pools" . | splitList " " -}}
{{- if has $pool (list "target" "prefill") -}}
{{- $found = append $found $pool -}}
{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{/* How many pods those are at most. */}}
{{- define "paceline.maxPagePods" -}}
{{- $pods := 0 -}}
{{- range include "paceline.pageComponents" . | fromJsonArray -}}
{{- $pods = add $pods (index $.Values.pools . "maxPods") -}}
{{- end -}}
{{- $pods -}}
{{- end -}}

{{/*
Whether a kind of connection inside the cluster has TLS. Argument: a list of the scope and "surfaces",
"valkey" or "drafts".
*/}}
{{- define "paceline.hasTls" -}}
{{- $tls := (index . 0).Values.tls -}}
{{- if and $tls.existingSecret (index $tls (index . 1)) -}}true{{- end -}}
{{- end -}}

{{- define "paceline.tlsFolder" -}}/etc/paceline/tls{{- end -}}

{{- define "paceline.tlsMount" -}}
- {name: tls, mountPath: {{ include "paceline.tlsFolder" . }}, readOnly: true}
{{- end -}}

{{- define "paceline.tlsVolume" -}}
- name: tls
  secret: {secretName: {{ .Values.tls.existingSecret }}, defaultMode: 0440}
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
{{- range $name, $key := dict "VALKEY_URL" .Values.externalValkey.urlKey "VALKEY_SENTINELS" .Values.externalValkey.sentinelsKey }}
{{- with $key }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.externalValkey.existingSecret }}
      key: {{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- if .Values.auth.encryptPages }}
- name: PACELINE_KV__ENCRYPTION_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "paceline.secretName" . }}
      key: page-encryption-key
{{- end }}
{{- if include "paceline.sharesPages" . }}
# Kubernetes puts the secret in; the rendered manifest never holds it.
- name: PACELINE_KV__TIERS
  value: {{ include "paceline.kvTiers" . | quote }}
{{- end }}
{{- end -}}

{{/*
kv.tiers as one line of JSON, hot tier first: what the release knows of each tier, over the settings
that the values give it.
*/}}
{{- define "paceline.kvTiers" -}}
{{- $set := .Values.tiers -}}
{{- $tiers := list -}}
{{- if include "paceline.hasValkey" . -}}
{{- $known := include "paceline.hotTier" . | fromJson -}}
{{- $tiers = append $tiers (merge $known (deepCopy $set.valkey)) -}}
{{- end -}}
{{- if .Values.ssd.enabled -}}
{{- $known := dict "kind" "ssd" "root" "/var/lib/paceline/kv" "budget_bytes" (int64 .Values.ssd.budgetBytesPerReplica) -}}
{{- $tiers = append $tiers (merge $known (deepCopy $set.ssd)) -}}
{{- end -}}
{{- /* Pods find each other's folders through the hot tier. */ -}}
{{- if and .Values.ssd.shared (eq (len $tiers) 2) (gt (int (include "paceline.maxPagePods" .)) 1) -}}
{{- $tiers = append $tiers (merge (dict "kind" "peers") (deepCopy $set.peers)) -}}
{{- end -}}
{{- if not $tiers -}}
{{- $tiers = append $tiers (dict "kind" "memory") -}}
{{- end -}}
{{- toJson $tiers -}}
{{- end -}}

{{/* Where the hot tier is, as JSON. Kubernetes replaces $(NAME) in it. */}}
{{- define "paceline.hotTier" -}}
{{- $tier := dict "kind" "valkey" -}}
{{- if .Values.valkey.enabled -}}
{{- $isTls := include "paceline.hasTls" (list . "valkey") -}}
{{- $url := printf "%s://:$(VALKEY_PASSWORD)@%s:%v/0" (ternary "rediss" "redis" (ne $isTls "")) (include "paceline.valkeyName" .) .Values.valkey.port -}}
{{- if $isTls -}}
{{- $url = printf "%s?ssl_ca_certs=%s/ca.crt" $url (include "paceline.tlsFolder" .) -}}
{{- end -}}
{{- $tier = merge $tier (dict "url" $url "is_cluster" (gt (int .Values.valkey.shards) 1)) -}}
{{- else -}}
{{- $tier = merge $tier (dict "url" "$(VALKEY_URL)" "is_cluster" .Values.externalValkey.isCluster) -}}
{{- if .Values.externalValkey.sentinelsKey -}}
{{- $_ := set $tier "sentinels" "$(VALKEY_SENTINELS)" -}}
{{- end -}}
{{- end -}}
{{- toJson $tier -}}
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

{{/*
Placement of a pod. Argument: a dict of the scope (root), its component and its values (at). Pods of a
component spread as the values say, or over .Values.spreadOver as far as there is room.
*/}}
{{- define "paceline.placement" -}}
{{- range $field := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with index $.at $field }}
{{ $field }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- if and .root.Values.spreadOver (not .at.topologySpreadConstraints) }}
topologySpreadConstraints:
  {{- range .root.Values.spreadOver }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "paceline.selectorLabels" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The disk of the SSD tier: a node's folder, a claim of the pod's own, or a part of the node's disk. */}}
{{- define "paceline.ssdVolume" -}}
{{- if .Values.ssd.hostPath -}}
hostPath: {path: {{ .Values.ssd.hostPath }}, type: Directory}
{{- else if .Values.ssd.storageClass -}}
ephemeral:
  volumeClaimTemplate:
    spec:
      accessModes: [ReadWriteOnce]
      storageClassName: {{ .Values.ssd.storageClass }}
      resources:
        requests: {storage: {{ .Values.ssd.sizeLimit }}}
{{- else -}}
emptyDir: {sizeLimit: {{ .Values.ssd.sizeLimit }}}
{{- end -}}
{{- end -}}
