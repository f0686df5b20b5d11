#!/usr/bin/env bash
# A completion with curl, whole and streamed; the exit status is that of the request.
#
#   PACELINE_URL=http://localhost:8000 bash docs/examples/curl.sh
set -euo pipefail

url="${PACELINE_URL:-http://localhost:8000}"
key="${PACELINE_API_KEY:-none}"
model="${PACELINE_MODEL:-smollm2-135m-instruct}"

ask() {
  curl --fail-with-body --silent --show-error --no-buffer "$url/v1/completions" \
    -H "Authorization: Bearer $key" -H 'Content-Type: application/json' -d "$1"
  echo
}

ask '{"model": "'"$model"'", "prompt": "One, two, three,", "max_tokens": 12, "temperature": 0}'
ask '{"model": "'"$model"'", "prompt": "One, two, three,", "max_tokens": 12, "temperature": 0,
      "stream": true}'
