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

until [ -s "$base/model.safetensors" ] && [ -s "$base/record.json" ]; do sleep 5; done
sleep 3
one() {
    "$python" training/reference/make_gates.py --base "$base" --method "$1" --minutes "$2" \
        --out "$out/reference-$1" --work "$logs/$1-work" >>"$logs/$1.log" 2>&1
}
one dcp "$dcp" || echo "dcp failed" >>"$logs/dcp.log"
one dms "$dms" || echo "dms failed" >>"$logs/dms.log"
echo "done" >>"$logs/dms.log"
