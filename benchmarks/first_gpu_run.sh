#!/usr/bin/env bash
# Everything that a GPU is asked the first time, into one folder: at most 30 minutes, each step under 10.
#
#     [PYTHON=python3] [CODE=FOLDER] [TOTAL=1800] benchmarks/first_gpu_run.sh [RESULTS]
#
# CODE is a folder that `benchmarks/gpu_code.py` wrote on a machine with nvcc; without it nvcc is needed here. A step that
# fails, or lacks its tool, does not stop the others: RESULTS/steps.txt says how each went, RESULTS/<step>.log what it
# said. Steps that TOTAL seconds have no room for are left out. docs/nvidia.md says what to read there. Exit code: 1 if a
# step failed.
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd) || exit 2
# where wheels of NVIDIA's tools put them
for folder in $("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu*/bin; do
    PATH=$PATH:$folder
done
TOTAL=${TOTAL:-1800}

say() { echo "$*" | tee -a "$OUT/steps.txt"; }

# step NAME SECONDS COMMAND..
step() {
    local name=$1 limit=$2 left=$((TOTAL - SECONDS)) begun=$SECONDS code
    shift 2
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -le 0 ]; then
        say "$name: left out, the time is over"
        return
    fi
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    case $code in
        0) say "$name: done in $((SECONDS - begun)) s" ;;
        124 | 137) say "$name: stopped after $limit s" ;;
        127) say "$name: not run, $1 is not installed" ;;
        *) say "$name: failed with $code after $((SECONDS - begun)) s: $(tail -n 1 "$OUT/$name.log")" ;;
    esac
}

: >"$OUT/steps.txt"
nvidia-smi -q >"$OUT/nvidia-smi.log" 2>&1
GPU=$("$PYTHON" -c '
import sys
sys.path.insert(0, "benchmarks")
from cuda_driver import CudaGpu, open_driver
print(CudaGpu(open_driver(), lambda gpu: b"").architecture)' 2>"$OUT/driver.log")
if [ -z "$GPU" ]; then
    say "driver: $(tail -n 1 "$OUT/driver.log")"
    exit 1
fi
say "driver: done, it is $GPU"
if [ -z "${CODE:-}" ]; then
    CODE=$OUT/code
    step compile 120 "$PYTHON" benchmarks/gpu_code.py "$CODE" "$GPU"
fi
KERNELS=("$PYTHON" benchmarks/gpu_kernels.py --code "$CODE" --out "$OUT")
DECODE=(--time --shapes decode --tokens 1 4 16 64)
PREFILL=(--time --shapes prefill --tokens 512 2048 8192)

# nothing is timed here, and the host has most of the work: all at once
step memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 9 "${KERNELS[@]}" --check --cases odd long &
step racecheck 120 compute-sanitizer --tool racecheck --error-exitcode 9 "${KERNELS[@]}" --check --cases odd &
for cases in odd long released; do
    step "check-$cases" 180 "${KERNELS[@]}" --check --cases "$cases" &
done
wait
step probes 90 "${KERNELS[@]}" --time --shapes prefill --ops down --hidden 8192 --ffn 8192 --experts 1 --tokens 8192
step decode 300 "${KERNELS[@]}" "${DECODE[@]}" --runs 2
step prefill 240 "${KERNELS[@]}" "${PREFILL[@]}"
# clocks are left as they are
step profiles 100 ncu --set full --clock-control none --force-overwrite --export "$OUT/profiles" \
    --kernel-name 'regex:decode|prefill' --launch-count 16 \
    "${KERNELS[@]}" --time --tokens 1 512 --rounds 1 --no-peers
step build 180 "$PYTHON" -m arriero.export build benchmarks/first_gpu_run.yaml
for bundle in fp16 gpu-int4; do
    step "runtime-$bundle" 45 "$PYTHON" benchmarks/gpu_runtime.py "bundles/first-gpu-run/$bundle" \
        --layers "$OUT/layers-$bundle.json"
done
! grep -qv ': done' "$OUT/steps.txt"
