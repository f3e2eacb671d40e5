{{/* Labels of every object, at the depth of metadata.labels. */}}
{{- define "undermesh.labels" }}
    app.kubernetes.io/name: undermesh
    app.kubernetes.io/instance: {{ .Release.Name | quote }}
    app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
    app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end }}

{{/* Secrets for the registry, in a pod's specification. */}}
{{- define "undermesh.pullSecrets" }}
{{- with .Values.image.pullSecrets }}
      imagePullSecrets:
{{- range . }}
        - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}
