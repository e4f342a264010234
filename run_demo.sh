#!/usr/bin/env bash
# From a slide to a trained, exported and inspected teacher, in minutes on a CPU or GPU and without downloaded data.
# Sets up first if needed. All that it makes lies in one folder; an earlier demo there is moved aside.
#
#   OUTPUT_DIR    that folder (default: output_demo beside this file)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
demo=$(realpath -m "${OUTPUT_DIR:-$root/output_demo}")
python=$root/.venv/bin/python
cd "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# A thread per core is slow as soon as anything else runs, and on a shared host there are more cores than ours.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

trap 'printf "run_demo.sh: interrupted; started again it moves what is there aside.\n" >&2; exit 130' INT

die() { printf 'run_demo.sh: %s\n' "$*" >&2; exit 1; }
stage() { printf '\n== %s\n   %s\n' "$1" "$2"; }

is_empty() { [[ -z $(find "$demo" -mindepth 1 -maxdepth 1 2>/dev/null) ]]; }

# Renames an earlier demo so that a new one starts in its place.
move_demo_aside() {
    local aside
    is_empty && return
    aside=$demo.$(date +%Y%m%d-%H%M%S)
    [[ ! -e $aside ]] || die "$aside exists already: wait a second and start again."
    mv -- "$demo" "$aside"
    printf 'Moved the earlier demo to %s\n' "$aside"
}

# Cuts the tiles of one slide into Parquet shards: name of the slide, tiles per level.
cut_tiles() {
    "$python" prepatching_scripts/create_sample_dataset_txt.py "$demo/slides/demo_$1.svs" \
        --output "$demo/lists/$1.txt" --levels 0 1 --per-level "$2"
    "$python" prepatching_scripts/build_parquet_sample_dataset.py "$demo/lists/$1.txt" \
        --output "$demo/parquet/$1" --encoding jpeg
}

# Starts the training in the background and kills it outright some steps after its first checkpoint.
train_until_killed() {
    local pid logged=""
    "${train[@]}" &
    pid=$!
    trap 'kill "$pid" 2>/dev/null || true' EXIT
    until [[ -n $logged && $(records) -gt $logged ]]; do
        kill -0 "$pid" 2>/dev/null || die "The training ended before it could be killed; see above."
        [[ -n $logged || ! -f $demo/run/last_checkpoint ]] || logged=$(records)
        sleep 0.1
    done
    kill -KILL "$pid"
    { wait "$pid" || true; }
    trap - EXIT
    printf 'Killed after %s, which is the last checkpoint.\n' "$(<"$demo/run/last_checkpoint")"
}

# Probes features of the labelled tiles, and of copies without colour: what stands for the teacher, further options.
probe() {
    "$python" -m dinov2.eval.probe --checkpoint "$@" --data "tissue=$demo/labelled" --grey --image-size 96 \
        --labels "$demo/labelled/labels.csv" --probes knn,logistic --neighbours 20 --pooling cls_mean
}

records() { wc -l <"$demo/run/metrics.jsonl"; }

is_empty || [[ -d $demo/slides ]] || die "OUTPUT_DIR=$demo is neither empty nor an earlier demo: name another."

stage "1/7 Set-up" "The environment in .venv, and what this machine offers."
./install.sh
move_demo_aside

stage "2/7 Slides" "Two pyramidal slides, from scikit-image's micrograph re-stained as haematoxylin-eosin."
"$python" prepatching_scripts/make_demo_slide.py --output-dir "$demo/slides" --labelled "$demo/labelled"

stage "3/7 Tiles" "Tissue positions go into sample lists, their tiles into Parquet; the white margin is rejected."
cut_tiles train 300
cut_tiles holdout 64

train=(
    "$python" dinov2/train/train.py --config-file dinov2/configs/train/demo.yaml --output-dir "$demo/run"
    data.path="$demo/parquet/train"
)
stage "4/7 Training" "Watch the total loss fall. After the first checkpoint the process is killed (SIGKILL)."
train_until_killed

stage "5/7 Resuming" "The same command resumes from the checkpoint: the steps it makes again have the same losses."
"${train[@]}"

stage "6/7 Report" "The exported teacher is loaded, held-out tiles are embedded, and all is drawn: open report.html."
"$python" -m dinov2.report "$demo/run" --tiles "$demo/parquet/holdout" --output "$demo/report"

teacher=$(find "$demo/run/eval" -name '*.pth' | sort -V | tail -n 1)
stage "7/7 What was learnt" "Gland or stroma? Tiles that nobody trained on, by the teacher, by its random start, by colour alone."
probe "$teacher" --compare "random:$teacher"
probe colour

cat <<END

Done. The loss before and after is in the first table above. The labels are those of an antibody in the micrograph, whose
stain was repainted: as they are, the tiles' colours tell the two tissues apart, and no network is needed. On the grey
copies colour is at chance (0.5); what the teacher has over its random start there, it has learnt from this one slide.
  run        $demo/run (config.yaml, metrics.jsonl, checkpoints/, eval/)
  teacher    $teacher
  drawings   $demo/report/{loss_curves,crops,pca,attention,neighbours}.png
  labelled   $demo/labelled/ (tiles, labels.csv)
  report     $demo/report/report.html
END
