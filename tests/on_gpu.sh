#!/usr/bin/env bash
# What only a GPU can show, what is missed most first: the tests that need one, training and sampling
# of CIFAR-10's U-Net with and without graphs, GroupNorm's rows, two runs side by side, and with
# CIFAR-10 in data/ its training. About eight minutes, each part with a limit; all of it in a folder.
#
#     bash tests/on_gpu.sh results
set -uo pipefail
out="$(mkdir -p "${1:-results}" && cd "${1:-results}" && pwd)"
here="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-python3}"
cd "$here"

part() {  # name, seconds, command ...
    local name="$1" limit="$2"
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    echo "$name: exit status $?" | tee -a "$out/$name.log"
    tail -n 3 "$out/$name.log"
}

"$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' | tee "$out/gpu"
part graphs 110 "$python" -m pytest tests/test_gpu.py -k test_gpu_
part bench 150 "$python" -m kernels.bench --quick --dtypes bf16 --unets cifar10 --batch 256
cd "$out"
train=("$python" "$here/ddim.py" --train --data-root "$here/data")
part compiled 30 "${train[@]}" --iters 20 --run warm  # Triton's kernels, before anything is timed
part digits-plain 40 "${train[@]}" --minutes 0.25 --run plain
part digits-graph 40 "${train[@]}" --minutes 0.25 --run graph --graph
tail -n 1 plain/metrics.csv graph/metrics.csv
cd "$here"
part others 60 "$python" -m pytest tests -k test_gpu_ --deselect tests/test_gpu.py \
    --deselect tests/test_scripts.py
for script in vdm ddgan; do
    part "failed-once-$script" 90 "$python" -m pytest tests/test_scripts.py \
        -k "test_gpu_ and $script"
done
cd "$out"
if ls "$here/data" 2>/dev/null | grep -qi cifar; then
    for script in ddim ddgan; do
        part "cifar10-$script" 90 "$python" "$here/$script.py" --train --data cifar10 --graph \
            --minutes 1 --data-root "$here/data"
    done
fi
