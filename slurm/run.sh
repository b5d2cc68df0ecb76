#!/usr/bin/env bash
#SBATCH --job-name=diffusion
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm/%j.out
#
# Runs a script on a cluster: one torchrun a node, one process a GPU.
#
#   sbatch slurm/run.sh rf_dit_cifar.py --steps 200000 --bs 256
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=32 slurm/run.sh rf_dit_cifar.py --bs 2048
#   sbatch --gpus-per-node=0 slurm/run.sh ddpm_unet_mnist.py        on CPUs
#   sbatch slurm/run.sh ddim_sample.py RUN --num-samples 50000 --npz
#   bash slurm/run.sh rf_dit_cifar.py ...        looks for what is missing first, then submits
#
# Submit from the repository; options of sbatch go before slurm/run.sh, flags of the script after its name.
# Before the time limit (--signal above) and in a preemption, the run's checkpoint is written. The job is queued
# again under its number, as after the failure of a node, and goes on in the same run folder, with the code that is
# in it, whatever was edited since. A job that samples goes on after its last batch. logs/slurm/JOB.out is the log;
# logs/slurm/JOB.run names the run folder, whose run.out names the log.
#
#   VENV             virtual environment        default .venv, else the python that is active
#   DIFFUSION_DATA   where datasets are         default data/
#   DIFFUSION_LOGS   where run folders go       default logs/
#   NPROC            processes a node           default one a GPU, or one without GPUs
set -uo pipefail

die() { echo "error: $*" >&2; exit 2; }

cd "${SLURM_SUBMIT_DIR:-.}" || die "the folder $SLURM_SUBMIT_DIR is not on this node; submit from a shared one"
script=${1:-}
[ -n "$script" ] || die "no script is named; sbatch slurm/run.sh SCRIPT.py [FLAGS]"
[ -f "$script" ] || [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || # then it is in the run's code
    die "there is no script $script in $PWD; submit from the repository's folder"
[ -d logs/slurm ] || die "there is no folder $PWD/logs/slurm, without which Slurm drops a job's log; make it"
[ -z "${VENV:-}" ] && [ -d .venv ] && VENV=.venv
if [ -n "${VENV:-}" ]; then
    [ -x "$VENV/bin/python" ] || die "VENV=$VENV holds no bin/python; make it, or unset VENV"
    PATH=$(realpath "$VENV")/bin:$PATH
fi
python -c 'import torch' 2>/dev/null || die "$(command -v python || echo python) cannot import torch; set VENV"
[ -z "${DIFFUSION_DATA:-}" ] || [ -d "$DIFFUSION_DATA" ] || die "DIFFUSION_DATA=$DIFFUSION_DATA is no folder"

if [ -z "${SLURM_JOB_ID:-}" ]; then # not in a job yet, and all is there
    exec sbatch "$0" "$@"
fi

# ---- in the job, on its first node

# The script writes the name of its run folder into the one and prints the other.
export DIFFUSION_JOB=$PWD/logs/slurm/$SLURM_JOB_ID.run
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # of one of the tasks, not of all
export DIFFUSION_JOB_LOG=$(scontrol show job "$job" | sed -n 's/^ *StdOut=//p')
before=$(stat --format=%s "$DIFFUSION_JOB_LOG" 2>/dev/null || echo 0) # size of the log
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    rm -f "$DIFFUSION_JOB" # of an older cluster's job
elif [ -s "$DIFFUSION_JOB" ]; then
    # With the code and flags that the run has, whatever was edited since; without a checkpoint it starts anew.
    run=$(cat "$DIFFUSION_JOB")
    code=$run/code/$(basename "$script")
    if [ -f "$code" ] && ls "$run"/checkpoints/step_*.pt >/dev/null 2>&1; then
        set -- "$code" --resume "$run"
    fi
fi
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date '+%F %T'): $*"

gpus=${SLURM_GPUS_ON_NODE:-0}
export NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
threads=$((${SLURM_CPUS_PER_TASK:-1} / NPROC))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port that is free now: several jobs may share a node.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

stopped=
trap 'stopped=USR1' USR1
trap 'stopped=TERM' TERM
# torchrun ignores USR1, which would end it; its processes do not.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'trap "" USR1; exec torchrun "$@"' torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$NPROC" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do
    if [ -n "$stopped" ]; then # perhaps this shell alone; again and again, as a script that starts is deaf
        scancel --signal=USR1 "$job" 2>/dev/null
        sleep 20 &
        wait -n "$step" $!
    else
        wait "$step" # a signal ends the waiting, too
    fi
done
wait "$step"
status=$?

# Or the script alone: some preemptions signal the steps, and not this shell. (grep -q would exit at the first match,
# and tail would fail.)
tail --bytes=+$((before + 1)) "$DIFFUSION_JOB_LOG" | grep '^stopped by a signal' >/dev/null && stopped=${stopped:-TERM}

# A cancelled job, or one that Slurm itself queues again, is not RUNNING any more.
if [ -n "$stopped" ] && [ "$status" != 0 ] && scontrol show job "$job" | grep -q JobState=RUNNING; then
    scontrol requeue "$job" && echo "stopped by $stopped; queued again" && exit 0
fi
exit "$status"
