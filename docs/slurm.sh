#!/usr/bin/env bash
# A run on Slurm that is put back into the queue when its time is up, and goes on:
#   sbatch docs/slurm.sh --config config/imagenet.yaml --use_amp data.root=/datasets/imagenet output_dir=/shared/runs/imagenet
# output_dir, and the folder that this is sent from, are storage that all nodes see. What a preempting Slurm does by itself
# (SIGTERM, then requeueing) needs nothing more than --requeue.
#SBATCH --job-name=soda
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

# 120 s before the end, Slurm tells this shell, which tells torchrun, which tells its processes: they save and end.
stopped=
stop() {
  stopped=yes
  kill -USR1 "$job"
}
trap stop USR1

head_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${PROCESSES_PER_NODE:-gpu}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$head_node:29400" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train.py "$@" &
job=$!

wait "$job"
status=$?
while kill -0 "$job" 2>/dev/null; do # a signal ended the wait, not the job
  wait "$job"
  status=$?
done
if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
