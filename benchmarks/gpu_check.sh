#!/bin/sh
# Run all tests and benchmarks that need a GPU in less than nine minutes: gpu_check.sh PYTHON OUT (`make gpu-check`).
#
# The steps are the tests marked `gpu`, the tests of the kernels, and every benchmark with --short. Each step is a separate
# process with a time limit. Benchmarks write their results to OUT after every measurement, so that a step which fails or
# runs out of time does not affect the other results. OUT/gpu-check.txt lists the outcome of each step, and
# OUT/gpu-check.log contains the output of all steps. The exit code is 1 if a step failed or ran out of time. Nothing is
# installed.

python=$1
mkdir -p "$2" && out=$(realpath "$2") && cd "$(dirname "$0")/.." || exit 2
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "skipped: no CUDA GPU is available to PyTorch"
    exit 0
fi
# Make the project importable without installing it, including `kernels/` under its import name.
names=$(mktemp -d)
trap 'rm -r "$names"' EXIT
ln -s "$PWD/kernels" "$names/fasttrain_kernels"
export PYTHONPATH="$PWD:$names:$PYTHONPATH" PYTHONUNBUFFERED=1
deadline=$(date +%s)
code=0

# step SECONDS ARGUMENTS...: run `python ARGUMENTS` for at most SECONDS plus the time that earlier steps did not use.
step() {
    deadline=$((deadline + $1))
    shift
    limit=$((deadline - $(date +%s)))
    printf '\n=== %s s: %s\n' "$limit" "$*" >>"$out/gpu-check.log"
    timeout --kill-after=5 "$limit" "$python" "$@" >>"$out/gpu-check.log" 2>&1
    case $? in
    0) outcome=passed ;;
    124 | 137) outcome="out of time" ;;
    *) outcome=failed ;;
    esac
    last=$(tail -n 1 "$out/gpu-check.log")
    case "$outcome $last" in
    failed*"No module named"* | failed*"is not installed"*) outcome=skipped ;;
    failed* | out*) code=1 ;;
    esac
    echo "$outcome: $* ($last)" | tee -a "$out/gpu-check.txt"
}

# benchmark NAME SECONDS ARGUMENTS...: run a benchmark as a step. It starts no new measurement in the last quarter of its time.
benchmark() {
    name=$1 seconds=$2
    shift 2
    left=$((deadline + seconds - $(date +%s)))
    step "$seconds" -m "benchmarks.$name" --short --limit $((3 * left / 4)) --out "$out/$name-cuda.json" "$@"
}

# The most important steps come first.
step 85 -m pytest -q -p no:cacheprovider -m gpu --continue-on-collection-errors
# These tests are not marked `gpu`, because they also run interpreted. Those with random shapes would compile for minutes.
step 80 -m pytest -q -p no:cacheprovider -n 12 -k "not any_shape" \
    tests/kernels/test_primitives.py tests/kernels/test_triton.py tests/kernels/test_memory.py
benchmark kernels 90
benchmark step 150 recipes/dino.yaml
benchmark propagation 60
benchmark loaders 65
exit $code
