#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, within ten minutes; JSON goes to ${OUT:-benchmarks/results}.
#
#   benchmarks/gpu_check.sh prepare      where a package index is: get the wheels that the GPU machine lacks
#   benchmarks/gpu_check.sh              on the GPU machine, which needs no network: run all steps
#   DEVICE=cpu benchmarks/gpu_check.sh   try the script: da3-nano on the CPU, without the steps that need a GPU
#
# The GPU machine has a Python with PyTorch, Triton, ONNX, ONNX Runtime for CUDA and cuda-bindings. PYTHON names it. A
# .venv of `make setup` is used instead if there is one.
#
# prepare reads PYTHON_VERSION (3.12), that of the GPU machine, and ORT. ORT=1.31.1 also gets that onnxruntime-gpu, in
# parts that can be carried one by one, for a machine whose own has no CUDA or is older than 1.31 (no CUDA graphs).
set -euo pipefail
cd "$(dirname "$0")/.."

wheels=.cache/gpu-wheels
parts=.cache/gpu-ort
environment=.cache/gpu-env
part_bytes=43000000
# What an image with PyTorch, ONNX and pytest lacks. Versions and hashes are those of requirements/.
needed=(
  addict aiohttp-retry annotated-types antlr4-python3-runtime backoff depth-anything-3 fastapi isal omegaconf
  opentelemetry-api orjson pybase64 pydantic pydantic-core pyspng python-multipart runpod shtab simplejpeg starlette
  tomli tomlkit tqdm-loggable typing-inspection uvicorn
)

python=${PYTHON:-python3}
has_venv=false
if [ -z "${PYTHON:-}" ] && .venv/bin/python -c '' 2>/dev/null; then
  python=.venv/bin/python
  has_venv=true
fi

pinned() { # NAME: its lines in the lists, with hashes
  local list lines
  for list in cuda test cpu; do
    lines=$(sed -n "/^$1==/,/[^\\\\]\$/p" "requirements/$list.txt")
    if [ -n "$lines" ]; then
      echo "$lines"
      return
    fi
  done
  echo "error: requirements/ has no package $1." >&2
  return 1
}

prepare() {
  local version=${PYTHON_VERSION:-3.12} name number count scratch
  local -a platform=(--only-binary=:all: --implementation cp --python-version "$version")
  for number in 28 27 17 5; do
    platform+=(--platform "manylinux_2_${number}_x86_64")
  done
  platform+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
  scratch=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder of now
  trap "rm -rf '$scratch'" EXIT
  rm -rf "$wheels" "$parts"
  mkdir -p "$wheels"
  for name in "${needed[@]}"; do
    pinned "$name" >>"$scratch/${name/antlr4*/source}.txt"
  done
  # Published as source only; its wheel is pure Python.
  "$python" -m pip wheel --quiet --no-deps --require-hashes -r "$scratch/source.txt" -w "$wheels"
  rm "$scratch/source.txt"
  cat "$scratch"/*.txt >"$scratch/all"
  "$python" -m pip download --quiet --no-deps --require-hashes --ignore-requires-python "${platform[@]}" \
    -r "$scratch/all" -d "$wheels"
  echo "Carry $wheels ($(du -sh "$wheels" | cut -f1)) to the GPU machine, then run there: benchmarks/gpu_check.sh"
  if [ -n "${ORT:-}" ]; then
    "$python" -m pip download --quiet --no-deps "${platform[@]}" "onnxruntime-gpu==$ORT" -d "$scratch/ort"
    split --bytes "$part_bytes" --numeric-suffixes=1 "$scratch"/ort/*.whl "$scratch/part."
    count=$(find "$scratch" -name 'part.*' | wc -l)
    for name in "$scratch"/part.*; do
      number=${name##*.}
      mkdir -p "$parts/$number-of-$count"
      mv "$name" "$parts/$number-of-$count/$(basename "$scratch"/ort/*.whl)"
    done
    echo "Carry each of these there too; they need not travel together:"
    printf '  %s\n' "$parts"/*
  fi
}

make_environment() { # an environment over the machine's own packages, with the wheels before them
  local site machine
  local -a ort=("$parts"/*-of-*/*.whl)
  "$python" -m venv --without-pip --clear "$environment"
  site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  machine=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  if [ -e "${ort[0]}" ]; then
    if [ "${#ort[@]}" -ne "$(sed -E 's/.*-of-0*([0-9]+).*/\1/' <<<"${ort[0]}")" ]; then
      echo "error: parts of onnxruntime-gpu are missing in $parts; carry them all, or none." >&2
      exit 2
    fi
    cat "${ort[@]}" >"$environment/$(basename "${ort[0]}")"
    # Where ONNX Runtime looks for CUDA's libraries.
    ln -sfn "$machine/nvidia" "$site/nvidia"
  fi
  find "$wheels" "$environment" -maxdepth 1 -name '*.whl' -print0 |
    xargs -0 "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --target "$site"
  printf '%s\n' "$PWD/runtime" "$PWD/export" "import site; site.addsitedir('$machine')" >"$site/machine.pth"
  python=$environment/bin/python
}

case ${1:-run} in
  prepare)
    prepare
    ;;
  run)
    if ! $has_venv; then
      if [ ! -d "$wheels" ]; then
        echo "error: $wheels is missing: run 'benchmarks/gpu_check.sh prepare' where a package index is." >&2
        exit 2
      fi
      make_environment
    fi
    exec "$python" -m benchmarks.gpu_check --device "${DEVICE:-cuda}" --out "${OUT:-benchmarks/results}"
    ;;
  *)
    echo "error: benchmarks/gpu_check.sh takes 'prepare' or nothing, not '$1'." >&2
    exit 2
    ;;
esac
