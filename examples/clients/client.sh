#!/usr/bin/env bash
# Depth of a photo from a DA3 endpoint. Needs curl and jq.
#
# client.sh runsync ADDRESS PHOTO [OUT]          one request to a queue endpoint, or to your own server
# client.sh run ADDRESS PHOTO [OUT]              in two steps: /run, then /status until it is done
# client.sh load-balancing ADDRESS PHOTO [OUT]   a load-balancing endpoint: waits for /ping first
#
# RUNPOD_API_KEY is the account's key, DA3_API_KEY the worker's; MODEL_ID names another model than
# the worker's. The preview is written to OUT, depth.png.
set -euo pipefail

usage() {
  echo "usage: client.sh runsync|run|load-balancing ADDRESS PHOTO [OUT]" >&2
  exit 1
}
[ $# -ge 3 ] || usage
kind=$1 address=${2%/} photo=$3 out=${4:-depth.png}
case $kind in
  runsync | load-balancing) path=/runsync ;;
  run) path=/run ;;
  *) usage ;;
esac
[ -r "$photo" ] || { echo "error: $photo cannot be read" >&2; exit 1; }
# Seconds to wait for a worker to be ready, and for a job to end.
patience=600

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# A photo is too long for a command line, and other users can read arguments: both go through files.
{
  [ -z "${RUNPOD_API_KEY:-}" ] || printf 'Authorization: Bearer %s\n' "$RUNPOD_API_KEY"
  [ -z "${DA3_API_KEY:-}" ] || printf 'da3-api-key: %s\n' "$DA3_API_KEY"
  echo 'Content-Type: application/json'
} >"$folder/headers"

ask() { # further arguments of curl; writes the response to a file and its HTTP status to $status
  status=$(curl --silent --show-error --max-time 330 --header "@$folder/headers" \
    --output "$folder/response.json" --write-out '%{http_code}' "$@") || status=000
}
field() { # one field of the response, or nothing
  jq -r "$1 // empty" "$folder/response.json" 2>/dev/null || true
}
is_waiting() {
  case $(field .status) in
    IN_QUEUE | IN_PROGRESS | RUNNING) true ;;
    *) false ;;
  esac
}

if [ "$kind" = load-balancing ]; then
  end=$((SECONDS + patience))
  until ask "$address/ping" && [ "$status" = 200 ]; do
    [ $SECONDS -lt $end ] || { echo "error: no worker was ready in time" >&2; exit 1; }
    sleep 1
  done
  in_input='' # the header has the key
else
  in_input=${DA3_API_KEY:-} # a queue passes no headers to the worker
fi

base64 <"$photo" | tr -d '\n' >"$folder/photo.base64"
IN_INPUT=$in_input jq -n --rawfile photo "$folder/photo.base64" '{input: ({image_base64: $photo}
  + (if env.IN_INPUT == "" then {} else {api_key: env.IN_INPUT} end)
  + (if (env.MODEL_ID // "") == "" then {} else {model_id: env.MODEL_ID} end))}' >"$folder/request.json"

ask --data-binary "@$folder/request.json" "$address$path"
end=$((SECONDS + patience))
while is_waiting && [ $SECONDS -lt $end ]; do
  id=$(field .id)
  sleep 0.5
  ask "$address/status/$id"
done
if [ "$(field .status)" != COMPLETED ]; then
  echo "error: HTTP $status: $(field .error)" >&2
  exit 1
fi

url=$(field .output.image_url)
if [ -n "$url" ]; then # the response was too large, so the preview is in the worker's bucket
  curl --silent --show-error --fail --output "$out" "$url"
else
  field .output.image_base64 | base64 --decode >"$out"
fi
jq -r --arg out "$out" \
  '.output | "\($out): unit \(.unit), min \(.min_depth), max \(.max_depth)"' "$folder/response.json"
