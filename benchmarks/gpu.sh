#!/usr/bin/env bash
# Everything worth knowing about a fresh GPU machine, in about ten minutes, in one file:
#
#     bash benchmarks/gpu.sh [REPORT]             REPORT: gpu-report.txt if not given
#
# 1 the machine; 2 the tests of the loop, the plan and the model, on CUDA; 3 training steps beside diffusers' DiT, with the
# share of the matrix rate that they reach; 4 sampling; 5 a short training whose losses are compared with a CPU's, image by
# image: noise differs between devices, so they agree in the mean only; 6 memory: what the plan says beside what was used.
# A step that fails is noted, and the next one runs. Not measured: this file has not run on a GPU yet.
set -uo pipefail
cd "$(dirname "$0")/.."
report=${1:-gpu-report.txt}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: > "$report"

step() {                                                             # TITLE COMMAND...
    echo "== $1" | tee -a "$report"
    shift
    echo "\$ $*" >> "$report"
    local begun=$SECONDS
    if declare -F "$1" > /dev/null; then "$@"; else timeout 240 "$@"; fi >> "$report" 2>&1
    echo "-- status $?, $((SECONDS - begun)) s" | tee -a "$report"
}

compare() {                                                          # the two logs, line by line
    python - "$work/cuda/log.jsonl" "$work/cpu/log.jsonl" << 'PYTHON'
import json, sys
gpu, cpu = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
print(f"{'images':>8}{'GPU loss':>12}{'CPU loss':>12}{'GPU images/s':>14}{'CPU images/s':>14}{'GPU GB':>9}")
for a, b in zip(gpu, cpu):
    print(f"{a['images']:8}{a['loss']:12.4f}{b['loss']:12.4f}{a['images_per_second'] or 0:14.1f}{b['images_per_second'] or 0:14.1f}"
          f"{a['peak_memory_gb']:9.2f}")
half = len(gpu) // 2
means = [sum(line["loss"] for line in log[half:]) / (len(log) - half) for log in (gpu, cpu)]
print(f"mean loss of the second half: GPU {means[0]:.4f}, CPU {means[1]:.4f}, ratio {means[0] / means[1]:.3f}")
sys.exit(not 0.9 < means[0] / means[1] < 1.1)
PYTHON
}

train() {                                                            # OUT: the short training
    timeout 240 python train.py radit --data "$work/phantom" --pixels --patch 8 --size XS --batch 32 --lr 1e-3 --warmup 1000 \
        --images 6400 --log-every 10 --save-every 100 --out "$1"
}

step "machine" nvidia-smi
step "torch" python -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())"
# Not those of several processes: NCCL refuses two on one GPU, and the tests give them no GPUs of their own.
step "tests on CUDA" python -m pytest -q -m "" tests/test_radit.py tests/test_flow.py tests/test_plan.py tests/test_loop.py \
    -k "not layout and not one_of_two and not dies_or_hangs and not running_statistics and not fsdp and not torchrun"
step "phantoms" env PYTHONPATH=.:tests python -c "import pathlib, phantom; phantom.write_source(pathlib.Path('$work/phantom'), 2000)"
step "short training on the GPU" train "$work/cuda"
export CUDA_VISIBLE_DEVICES=
step "the same on the CPU" train "$work/cpu"
unset CUDA_VISIBLE_DEVICES
step "losses of both" compare
step "training steps, XL" python benchmarks/training.py --size XL --grid 32 --batch 16 --steps 5 --rounds 1
step "training steps, B" python benchmarks/training.py --size B --grid 32 --batch 32 --steps 5 --rounds 1
step "sampling" python benchmarks/sampling.py
step "plan, to compare the peak memory with" python -m training plan --size XL --gpus 1 --batch 16
if command -v torchrun > /dev/null && [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then
    step "two GPUs, FSDP" torchrun --standalone --nproc_per_node=2 train.py radit --data "$work/phantom" --pixels --patch 8 \
        --size B --batch 32 --images 1600 --log-every 10 --save-every 50 --fsdp --out "$work/two"
fi
echo "written to $report"
