#!/usr/bin/env bash
# What only a GPU can show, what is missed most first: the tests that need one, GroupNorm's rows,
# training and sampling of CIFAR-10's U-Net with and without graphs, two runs side by side, and with
# CIFAR-10 in data/ its training. About eight minutes, each part with a limit; all of it in a folder.
#
#     bash tests/on_gpu.sh results
set -uo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
out="$(mkdir -p "${1:-results}" && cd "${1:-results}" && pwd)"
python="${PYTHON:-python3}"
cd "$here"

part() {  # name, seconds, command ...
    local name="$1" limit="$2"
    shift 2
    echo "== $name"
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    echo "$name: exit status $?" | tee -a "$out/$name.log"
}

"$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' | tee "$out/gpu"
part tests 170 "$python" -m pytest tests -k gpu -q
part vdm 40 "$python" -m pytest tests/test_scripts.py -k "test_gpu and vdm" -q
part norms 110 "$python" -m kernels.bench --quick --dtypes bf16 --unets cifar10 --batch 256
cd "$out"
for way in plain graph; do
    part "digits-$way" 25 "$python" "$here/ddim.py" --train --minutes 0.25 --run "$way" \
        --data-root "$here/data" $([ "$way" = graph ] && echo --graph)
done
if [ -e "$here/data/cached" ] && ls "$here/data" | grep -qi cifar; then
    for script in ddim ddgan; do
        part "cifar10-$script" 90 "$python" "$here/$script.py" --train --data cifar10 --graph \
            --minutes 1 --data-root "$here/data"
    done
fi
