#!/usr/bin/env bash
# Builds, tests, sanitizes and benchmarks the CUDA kernels on a machine with an NVIDIA GPU, in less than nine minutes and
# without a network. Leaves in OUTDIR: summary.md, cuda.csv, cuda.png, kernels.csv, ncu.csv and a log of each step.
#
#   FLASH_ATTN_WHEELS=DIR tools/gpu_report.sh OUTDIR
#
# Needs nvcc 12.8 or newer, CMake, Ninja and Python with torch; compute-sanitizer and ncu if they are there. DIR holds wheels of
# apache-tvm-ffi, pytest and hypothesis for that Python, as far as it does not have them:
#   pip download -d DIR --python-version 3.12 --only-binary=:all: apache-tvm-ffi pytest hypothesis
set -uo pipefail

if [[ $# -ne 1 ]]; then
  sed -n '2,10p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
venv=$out/venv
python=$venv/bin/python
failures=0
printf '# GPU report\n\n' >"$out/summary.md"

note() { echo "- $*" | tee -a "$out/summary.md"; }

# step NAME SECONDS COMMAND...: a step with a time limit. Its output goes to NAME.log, its outcome to the summary.
step() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  echo "=== $name"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  if [[ $status -eq 0 ]]; then
    note "$name: passed in $((SECONDS - start)) s"
    return 0
  fi
  failures=$((failures + 1))
  note "$name: FAILED with status $status after $((SECONDS - start)) s, see $name.log"
  tail -n 15 "$out/$name.log"
  return 1
}

# The limits add up to less than nine minutes (tests/python/test_gpu_report.py).
export FLASH_ATTN_LIBRARY_DIR=$out/build/lib PYTHONPATH=$PWD
install=("$python" -m pip install --no-index)
[[ -n ${FLASH_ATTN_WHEELS:-} ]] && install+=(--find-links "$FLASH_ATTN_WHEELS")
step environment 30 python3 -m venv --system-site-packages "$venv" || exit 1
step packages 25 "${install[@]}" apache-tvm-ffi pytest hypothesis || exit 1
step machine 15 bash -c "nvidia-smi && '$python' -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'"
step configure 20 cmake -S . -B "$out/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DFLASH_ATTN_CUDA=ON \
  -DFLASH_ATTN_TESTS=OFF -DPython_EXECUTABLE="$python" || exit 1
step build 150 cmake --build "$out/build" || exit 1
cp "$out/build/cuda/kernels.csv" "$out/"
if command -v nvdisasm >/dev/null; then
  step pipes 15 "$python" tools/kernel_table.py "$out/build/cuda/kernels.csv" --print pipes
else
  note "pipes: skipped, no nvdisasm"
fi
step test 70 "$python" -m pytest -p no:cacheprovider -q tests/python/test_cuda_device.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" 25 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" tools/gpu_launches.py --dtype bf16 fp32
  done
else
  note "sanitizers: skipped, no compute-sanitizer"
fi
step benchmark 80 "$python" benchmarks/benchmark_cuda.py --budget 60 --out "$out"
if command -v ncu >/dev/null; then
  step ncu 30 ncu --csv --log-file "$out/ncu.csv" --kernel-name 'regex:flash_(fwd|decode)' --section SpeedOfLight \
    --section Occupancy --section MemoryWorkloadAnalysis "$python" tools/gpu_launches.py --dtype bf16
else
  note "ncu: skipped, it is not there"
fi

fence='```'
{
  printf '\n## Kernels\n\n%s\n' "$fence"
  cat "$out/kernels.csv"
  printf '%s\n\n' "$fence"
  [[ -f $out/pipes.log ]] && cat "$out/pipes.log"
  printf '\n## Times; TFLOP/s or, of decoding, GB/s\n\n%s\n' "$fence"
  grep ' | ' "$out/benchmark.log"
  printf '%s\n\n%d steps failed; %d s in all.\n' "$fence" "$failures" "$SECONDS"
} >>"$out/summary.md"
rm -rf "$venv"
echo "wrote $out/summary.md"
exit "$((failures > 0))"
