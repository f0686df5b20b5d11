{{/*
TLS in front of an ingress pod's ports: neither HAProxy nor gRPC as Ray Serve starts them has any.
It starts before Ray and ends after it, so that draining streams keep their connection.
*/}}
{{- define "paceline.tlsSidecar" -}}
initContainers:
  - name: tls
    image: {{ include "paceline.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    restartPolicy: Always
    command: [sh, /etc/paceline/tls-proxy/tls.sh]
    env:
      - {name: CONF_DIR, value: /etc/paceline/tls-proxy}
      - {name: TLS_DIR, value: {{ include "paceline.tlsFolder" . }}}
      - {name: LOOK_SECONDS, value: "60"}
    securityContext:
      {{- include "paceline.containerSecurity" . | nindent 6 }}
      readOnlyRootFilesystem: true
    ports:
      - {name: https, containerPort: {{ .Values.tls.httpPort }}}
      - {name: grpcs, containerPort: {{ .Values.tls.grpcPort }}}
    startupProbe:
      tcpSocket: {port: https}
      periodSeconds: 2
      failureThreshold: 30
    livenessProbe:
      tcpSocket: {port: https}
      failureThreshold: 6
    resources:
      {{- toYaml .Values.tls.resources | nindent 6 }}
    volumeMounts:
      - {name: tls-proxy, mountPath: /etc/paceline/tls-proxy, readOnly: true}
      {{- include "paceline.tlsMount" . | nindent 6 }}
{{- end -}}
