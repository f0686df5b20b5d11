{{/*
A Valkey server, or a cluster of several: settings, pods and services. Argument: a dict of
  root        the chart's scope
  component   its pods' app.kubernetes.io/component, and the end of its names
  statefulSet the StatefulSet's name, with which the pods' names begin
  secretKey   where its password is in the release's Secret
  port        its port
  shards      its pods; more than one are a cluster
  isTls       whether it takes TLS alone
  at          its values: resources, placement, and storage if it keeps anything
  settings    more lines of valkey.conf
*/}}
{{- define "paceline.valkeyServer" -}}
{{- $name := include "paceline.componentName" . -}}
{{- $conf := printf "%s\n%s" (include "paceline.valkeyListens" .) (trim .settings) -}}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ $name }}
  labels:
    {{- include "paceline.labels" .root | nindent 4 }}
data:
  valkey.sh: |
    {{- .root.Files.Get "files/valkey.sh" | nindent 4 }}
  valkey.conf: |
    {{- $conf | nindent 4 }}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ .statefulSet }}
  labels:
    {{- include "paceline.labels" .root | nindent 4 }}
spec:
  replicas: {{ .shards }}
  serviceName: {{ $name }}-nodes
  podManagementPolicy: Parallel
  selector:
    matchLabels:
      {{- include "paceline.valkeyLabels" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "paceline.valkeyLabels" . | nindent 8 }}
      annotations:
        checksum/config: {{ printf "%s%s" $conf (.root.Files.Get "files/valkey.sh") | sha256sum }}
    spec:
      {{- include "paceline.valkeyPod" . | nindent 6 }}
  {{- with .at.storage }}
  volumeClaimTemplates:
    - metadata:
        name: data
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $.at.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests: {storage: {{ . }}}
  {{- end }}
{{- range $service := list $name (printf "%s-nodes" $name) }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $service }}
  labels:
    {{- include "paceline.labels" $.root | nindent 4 }}
spec:
  {{- if ne $service $name }}
  # A name for each pod, ready or not: shards must find each other to become ready.
  clusterIP: None
  publishNotReadyAddresses: true
  {{- end }}
  selector:
    {{- include "paceline.valkeyLabels" $ | nindent 4 }}
  ports:
    - {name: valkey, port: {{ $.port }}, targetPort: valkey}
{{- end }}
{{- end -}}

{{- define "paceline.valkeyPod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "paceline.podSecurity" .root | nindent 2 }}
{{- include "paceline.placement" . }}
containers:
  - name: valkey
    image: {{ .root.Values.valkey.image.repository }}:{{ .root.Values.valkey.image.tag }}
    imagePullPolicy: {{ .root.Values.valkey.image.pullPolicy }}
    command: [sh, /etc/valkey/valkey.sh]
    args: [start]
    env:
      - name: POD_NAME
        valueFrom:
          fieldRef: {fieldPath: metadata.name}
      - name: POD_IP
        valueFrom:
          fieldRef: {fieldPath: status.podIP}
      # As valkey-cli wants it; the script hands it to the server too.
      - name: REDISCLI_AUTH
        valueFrom:
          secretKeyRef:
            name: {{ include "paceline.secretName" .root }}
            key: {{ .secretKey }}
      - {name: NODES_DOMAIN, value: {{ include "paceline.componentName" . }}-nodes.{{ .root.Release.Namespace }}.svc}
      - {name: SHARDS, value: {{ .shards | quote }}}
      - {name: PORT, value: {{ .port | quote }}}
      - {name: CONF_DIR, value: /etc/valkey}
      - {name: RUN_DIR, value: /run/valkey}
      - {name: DATA_DIR, value: /data}
      - {name: LOOK_SECONDS, value: "5"}
      {{- if .isTls }}
      - {name: TLS_DIR, value: {{ include "paceline.tlsFolder" .root }}}
      {{- end }}
    securityContext:
      {{- include "paceline.containerSecurity" .root | nindent 6 }}
      readOnlyRootFilesystem: true
    ports:
      - {name: valkey, containerPort: {{ .port }}}
      {{- if gt (int .shards) 1 }}
      - {name: bus, containerPort: {{ add .port 10000 }}}
      {{- end }}
    readinessProbe: &probe
      exec: {command: [sh, /etc/valkey/valkey.sh, ping]}
      periodSeconds: 10
      timeoutSeconds: 5
    livenessProbe:
      <<: *probe
      failureThreshold: 6
    resources:
      {{- toYaml .at.resources | nindent 6 }}
    volumeMounts:
      - {name: config, mountPath: /etc/valkey, readOnly: true}
      - {name: run, mountPath: /run/valkey}
      - {name: data, mountPath: /data}
      {{- if .isTls }}
      {{- include "paceline.tlsMount" .root | nindent 6 }}
      {{- end }}
volumes:
  - name: config
    configMap: {name: {{ include "paceline.componentName" . }}}
  - name: run
    emptyDir: {medium: Memory, sizeLimit: 1Mi}
  {{- if not .at.storage }}
  - name: data
    emptyDir: {medium: Memory, sizeLimit: 1Mi}
  {{- end }}
  {{- if .isTls }}
  {{- include "paceline.tlsVolume" .root | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "paceline.valkeyListens" -}}
{{- if .isTls -}}
{{- $folder := include "paceline.tlsFolder" .root -}}
port 0
tls-port {{ .port }}
tls-cert-file {{ $folder }}/tls.crt
tls-key-file {{ $folder }}/tls.key
tls-ca-cert-file {{ $folder }}/ca.crt
tls-auth-clients no
tls-cluster yes
{{- else -}}
port {{ .port }}
{{- end }}
{{- end -}}

{{/* A cluster of another number of shards is another cluster, with pods of its own. */}}
{{- define "paceline.valkeyLabels" -}}
{{ include "paceline.selectorLabels" .root }}
app.kubernetes.io/component: {{ .component }}
paceline.io/shards: {{ .shards | quote }}
{{- end -}}

{{- define "paceline.componentName" -}}
{{ include "paceline.fullname" .root }}-{{ .component }}
{{- end -}}
