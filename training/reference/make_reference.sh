#!/bin/sh
# Gates on the reference base model, once it is there, in the little time of two CPU cores: DCP at falling kept fractions, each
# going on from the one before; as many tokens dense, for comparison; DMS at 8x. The recipes by themselves (1,500 steps) are
# what to run where there is time. What is finished is not made again. From the repository root:
#   training/reference/make_reference.sh [BASE] [FOLDER]
set -eu
base=${1:-build/reference/base}
out=${2:-build/reference}
train="${BIN:-.venv/bin}/vllm-prune train"

one() {  # recipe, name, overrides
    recipe=$1 name=$2
    shift 2
    [ -d "$out/$name" ] || $train "examples/recipes/$recipe.yaml" --set output="$out/$name" "$@" >>"$out/$name.log" 2>&1
}
from() {  # name, the one before, overrides
    name=$1 before=$out/$2
    shift 2
    one dcp-reference "$name" --set model="$before" --set gate.init_from="$before" --set objective.ramp=0.02 "$@"
}
band='objective.alpha={schedule: band, start: 0.5, from: 0.0, until: 0.8}'
hard='objective.alpha={schedule: linear, start: 6.0, end: 8.0, until: 0.7}'
one dcp-reference dcp-0.5 --set model="$base" --set objective.keep=0.5 --set training.steps=160
from dcp-0.3 dcp-0.5 --set objective.keep=0.3 --set training.steps=120 --set training.lr=0.003 --set "$band"
from dcp-0.2 dcp-0.3 --set objective.keep=0.2 --set training.steps=120 --set training.lr=0.003 --set "$band"
# The base gets used to the gates of dcp-0.3, which hardly move any more.
from dcp-0.3b dcp-0.3 --set objective.keep=null --set objective.gamma=0.15 --set training.steps=90 --set "$hard" \
    --set 'training.lengths=[[0.6,1024],[1.0,2048]]'
one dense-reference dense --set model="$base" --set training.steps=400
one dms-reference dms --set model="$base" --set training.steps=120 --set training.lengths=1024
# DCP distilled from the base, at a quarter of the rate: what examples/reference-dcp holds.
one dcp-reference dcp-kl --set model="$base" --set gate.init_from="$out/dcp-0.5" --set objective.kl_forward=1.0 \
    --set objective.keep=0.3 --set objective.ramp=0.02 --set training.steps=150 --set training.lengths=1024 \
    --set training.lr=0.001 --set training.adam_lr=2.0e-4 \
    --set 'objective.alpha={schedule: band, start: 0.4, from: 0.0, until: 0.7}'
