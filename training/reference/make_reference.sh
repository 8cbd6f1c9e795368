#!/bin/sh
# Gates on the reference base model, once it is there: DCP in two stages, as many tokens dense, for comparison, and DMS at 8x.
# What is finished is not made again. About two hours on one core. From the repository root:
#   training/reference/make_reference.sh [BASE] [FOLDER]
set -eu
base=${1:-build/reference/base}
out=${2:-build/reference}
train="${BIN:-.venv/bin}/vllm-prune train"

one() {  # recipe, name, overrides
    recipe=$1 name=$2
    shift 2
    [ -d "$out/$name" ] || $train "examples/recipes/$recipe.yaml" --set output="$out/$name" --set "$@" >>"$out/$name.log" 2>&1
}
one dcp-reference dcp-slow model="$base"
# Decisions still near their thresholds are made firm: no leak, a narrow band again, smaller steps.
one dcp-reference dcp-fin model="$out/dcp-slow" --set gate.init_from="$out/dcp-slow" --set teacher="$base" \
    --set objective.keep=0.17 --set objective.leak=0 \
    --set 'objective.alpha={schedule: linear, start: 4.0, end: 8.0, from: 0.0, until: 0.7}' \
    --set training.steps=200 --set 'training.lengths=[[0.5,1024],[1.0,2048]]' --set training.lr=0.001 \
    --set training.adam_lr=2.0e-4 --set training.gate_lr=1.0e-3 --set training.bias_lr=0.01 --set training.warmup=0.05
one dense-reference dense-slow model="$base"
one dms-reference dms model="$base"
