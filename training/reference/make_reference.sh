#!/bin/sh
# Gates on the reference base model, once it is there: DCP at four kept fractions, each going on from the one before; the
# same number of steps dense, for comparison; DMS at 8x. What is finished is not made again. From the repository root:
#   training/reference/make_reference.sh [BASE] [FOLDER]
set -eu
base=${1:-build/reference/base}
out=${2:-build/reference}
train="${PYTHON_BIN:-.venv/bin}/vllm-prune train"

until [ -s "$base/model.safetensors" ] && [ -s "$base/tokenizer_config.json" ]; do sleep 2; done
one() {  # recipe, name, overrides
    recipe=$1 name=$2
    shift 2
    [ -d "$out/$name" ] || $train "examples/recipes/$recipe.yaml" --set output="$out/$name" "$@" >>"$out/$name.log" 2>&1
}
one dcp-reference dcp-0.5 --set model="$base" --set objective.keep=0.5
before=$out/dcp-0.5 steps=120
for keep in 0.3 0.2 0.1; do
    one dcp-reference "dcp-$keep" --set model="$before" --set gate.init_from="$before" --set objective.keep=$keep \
        --set training.steps=$steps --set training.lr=0.003 --set objective.ramp=0.02 \
        --set 'objective.alpha={schedule: band, start: 0.5, from: 0.0, until: 0.8}'
    before=$out/dcp-$keep
done
one dense-reference dense --set model="$base" --set training.steps=400
one dms-reference dms --set model="$base"
