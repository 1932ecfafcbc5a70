#!/usr/bin/env bash
# All that is to be done on a machine with a GPU, in one go within 9 minutes and without a network:
# the GPU tests, then the benchmark of SiT-B/2, L/2 and XL/2, beside REPA's step where a clone is.
#
#   benchmarks/gpu.sh OUT [REPA_CLONE]     # OUT gets *.json, *.txt and summary.txt
#
# It installs nothing: PyTorch with CUDA and the package's own dependencies are to be there. What it
# leaves out, for want of time or of a package, it says in OUT/summary.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT [REPA_CLONE]}")
repa=${2:-}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
deadline=$((SECONDS + ${LIMIT:-520}))
mkdir -p "$out"
: >"$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }

# run SECONDS NAME COMMAND...: at most so long, and only while there is time
run() {
    local limit=$1 name=$2 left=$((deadline - SECONDS))
    shift 2
    if ((left < 20)); then
        say "skipped: $name (no time left)"
        return 0
    fi
    timeout $((limit < left ? limit : left)) "$@" >"$out/$name.txt" 2>&1
    local code=$?
    say "$name: $( ((code)) && echo "FAILED ($code)" || echo ok), $((deadline - SECONDS)) s left"
    tail -n 6 "$out/$name.txt" | sed 's/^/    /' >>"$out/summary.txt"
}

python -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.__version__, torch.cuda.get_device_name())' |
    tee -a "$out/summary.txt" || exit 2
for package in pytest safetensors tyro tqdm blake3 pyarrow diffusers transformers; do
    python -c "import $package" 2>/dev/null || say "missing: $package"
done

run 200 tests python -m pytest -q -x -m gpu tests
for size in b l xl; do
    batch=$([ $size = xl ] && echo 128 || echo 256)
    for compile in true false; do
        run 90 "bench-$size-compile-$compile" python -m erw bench "sit_${size}2_in256_erw" --data.batch-size "$batch" \
            --optim.compile $compile --repeat 10 --out "$out/bench-$size-compile-$compile.json"
    done
done
if [ -n "$repa" ]; then
    run 150 step-xl python -m erw bench sit_xl2_in256_repa --data.batch-size 64 --optim.compile true --repeat 10 \
        --peer "repa=$repa" --out "$out/step-xl.json"
else
    say "skipped: REPA's step (no clone given)"
fi
say "done"
