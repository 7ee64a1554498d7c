#!/usr/bin/env bash
# Everything that needs a GPU, on a machine without a network, in 10 minutes: build and install, a first look at every
# kernel family (smoke), the benchmark into bench/results/<device>.json, the tests marked cuda, and compute-sanitizer.
#
#   bench/gpu.sh            all stages; one that passed on these sources is not run again
#   bench/gpu.sh STAGE ...  these stages, whether they passed or not: build smoke bench test dropin memcheck racecheck
#                           synccheck initcheck
#   PYTHON=/path/to/python  the interpreter that has torch (default python3); needs pybind11, cmake, ninja and what the
#                           extra `test` names; pytest-xdist and pytest-timeout shorten the tests
#   GPU_OUT=/folder         logs and results are copied there after every stage
#
# Logs and what has passed: build/gpu/. Exit code 1 if a stage failed; the others run all the same, save after a failed build.
set -u -o pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
state=build/gpu
mkdir -p "$state" bench/results

sources=$(find csrc python tests bench CMakeLists.txt pyproject.toml -type f ! -name '*.so' ! -name '*.json' ! -path '*__pycache__*' \
  -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)

build() {
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  for tool in nvcc cmake ninja; do command -v $tool && $tool --version | tail -n 1; done
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' || return 1
  "$python" -m pip install --no-build-isolation --no-deps --no-index --force-reinstall \
    --config-settings=cmake.define.TORCHWELD_CUDA=ON . || build_without_pip || return 1
  "$python" -c 'import torch; from torchweld import backend; why = backend.unavailable("cuda"); assert why is None, why'
}

build_without_pip() { # scikit-build-core is missing, or too old: cmake and ninja do what it asks them to do
  local site
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))') &&
    cmake -S . -B build/gpu/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DTORCHWELD_CUDA=ON \
      -DPython_EXECUTABLE="$(command -v "$python")" \
      -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" &&
    cmake --build build/gpu/cmake && cmake --install build/gpu/cmake --prefix "$site" && cp -r python/torchweld "$site"
}

tests() { # paths and options
  local workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc)")
  "$python" -c 'import pytest_timeout' 2>/dev/null && workers+=(--timeout 40)
  # A file that cannot be imported, for want of a package, must not keep the others from running.
  "$python" -m pytest -m cuda -q --tb=line -p no:cacheprovider --continue-on-collection-errors "${workers[@]}" "$@"
}

sanitize() { # tool, options...
  command -v compute-sanitizer || { echo 'compute-sanitizer is not on PATH (it comes with the CUDA toolkit)'; return 1; }
  local tool=$1
  shift
  # Each tensor in an allocation of its own, so that a step beyond it is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$@" "$python" bench/sanitize.py
}

bench() {
  local device
  device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || return 1
  "$python" -m torchweld bench --device cuda --quick --no-compile --json "bench/results/$device.json"
}

collect() { # what a machine that is given back must not keep
  [[ -n ${GPU_OUT:-} ]] || return 0
  mkdir -p "$GPU_OUT" && cp -r "$state"/*.log bench/results "$GPU_OUT"
}

failed=0
report=()
stage() { # name, seconds, command...
  local name=$1 limit=$2 started=$SECONDS rc
  shift 2
  if [[ -z $wanted && -f $state/$name.passed && $(<"$state/$name.passed") == "$sources" ]]; then
    report+=("$(printf '%-10s passed before' "$name")")
    return 0
  fi
  [[ -z $wanted || " $wanted " == *" $name "* ]] || return 0
  echo "== $name (at most $limit s; log in $state/$name.log)"
  rm -f "$state/$name.passed"
  timeout --kill-after=10 "$limit" bash -c '"$@"' _ "$@" >"$state/$name.log" 2>&1
  rc=$?
  collect
  if ((rc == 0)); then
    echo "$sources" >"$state/$name.passed"
    report+=("$(printf '%-10s passed   %4d s' "$name" $((SECONDS - started)))")
  else
    failed=1
    tail -n 40 "$state/$name.log"
    report+=("$(printf '%-10s FAILED   %4d s, exit code %d, %s' "$name" $((SECONDS - started)) $rc "$state/$name.log")")
  fi
  return $rc
}

wanted="$*"
export python
export -f build build_without_pip tests sanitize bench
if stage build 150 build; then
  stage smoke 120 "$python" bench/smoke.py --seconds 30
  cat "$state/smoke.log" 2>/dev/null
  stage bench 110 bench
  stage test 110 tests tests --ignore-glob '*/tests/dropin/*_db.py'
  # Only our kernels are watched, save for initcheck, which must see who wrote the memory that they read.
  for tool in memcheck racecheck synccheck; do stage $tool 35 sanitize $tool --kernel-name kernel_substring=torchweld; done
  stage initcheck 45 sanitize initcheck
  stage dropin 80 tests tests/dropin/test_*_db.py
fi
printf '%s\n' "${report[@]}"
exit $failed
