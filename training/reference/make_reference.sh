#!/bin/sh
# Gate training of both reference checkpoints, once the base model is there. Run from the repository root:
#   training/reference/make_reference.sh [BASE] [DCP minutes] [DMS minutes] [folder of the checkpoints]
set -eu
base=${1:-build/reference/base}
dcp=${2:-31}
dms=${3:-12}
out=${4:-examples}
python=${PYTHON:-.venv/bin/python}
logs=$(dirname "$base")

until [ -s "$base/model.safetensors" ] && [ -s "$base/tokenizer_config.json" ]; do sleep 5; done
sleep 3
one() {  # a second try continues from the last checkpoint, without torch.compile
    method=$1 minutes=$2
    shift 2
    "$python" training/reference/make_gates.py --base "$base" --method "$method" --minutes "$minutes" \
        --out "$out/reference-$method" --work "$logs/$method-work" "$@" >>"$logs/$method.log" 2>&1
}
one dcp "$dcp" || one dcp "$dcp" --set compile=false || echo "dcp failed" >>"$logs/dcp.log"
one dms "$dms" || one dms "$dms" --set compile=false || echo "dms failed" >>"$logs/dms.log"
echo "done" >>"$logs/dms.log"
