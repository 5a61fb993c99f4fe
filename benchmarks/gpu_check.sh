#!/bin/sh
# Everything that wants a GPU, in under nine minutes: gpu_check.sh PYTHON OUT (`make gpu-check`). Installs nothing.
#
# Runs the tests marked `gpu`, those of the kernels and the short form of every benchmark, one after another, each a
# process with a time limit. A benchmark writes its JSON into OUT as it goes, so that a step which fails or runs out of
# time costs no other figure. gpu-check.txt says how each step ended, gpu-check.log holds all they print. The exit code
# is 1 if a step failed or ran out of time.

python=$1
mkdir -p "$2" && out=$(realpath "$2") && cd "$(dirname "$0")/.." || exit 2
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "skipped: torch sees no GPU"
    exit 0
fi
# The project is found uninstalled: `kernels/` also under its import name.
names=$(mktemp -d)
trap 'rm -r "$names"' EXIT
ln -s "$PWD/kernels" "$names/fasttrain_kernels"
export PYTHONPATH="$PWD:$names:$PYTHONPATH" PYTHONUNBUFFERED=1
deadline=$(date +%s)
code=0

# step SECONDS WORDS...: python WORDS, with SECONDS and all that the steps before it left of theirs.
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

# benchmark NAME SECONDS WORDS...: in the last quarter of its time it begins nothing new.
benchmark() {
    name=$1 seconds=$2
    shift 2
    left=$((deadline + seconds - $(date +%s)))
    step "$seconds" -m "benchmarks.$name" --short --limit $((3 * left / 4)) --out "$out/$name-cuda.json" "$@"
}

# The figures that are most wanted first.
step 85 -m pytest -q -p no:cacheprovider -m gpu --continue-on-collection-errors
# Not marked `gpu`: without one they run interpreted. Hypothesis' shapes would compile for minutes.
step 80 -m pytest -q -p no:cacheprovider -n 12 -k "not any_shape" \
    tests/kernels/test_primitives.py tests/kernels/test_triton.py tests/kernels/test_memory.py
benchmark kernels 90
benchmark step 150 recipes/dino.yaml
benchmark propagation 60
benchmark loaders 65
exit $code
