#!/usr/bin/env bash
# Runs train.py on Slurm. When the time limit is near, the job saves, goes back into the queue, and later resumes:
#   sbatch docs/slurm.sh --config config/imagenet.yaml --use_amp data.root=/datasets/imagenet output_dir=/shared/runs/imagenet
# All nodes must see output_dir and the folder in which sbatch is called. For preemption, --requeue is enough: Slurm itself
# sends SIGTERM and puts the job back into the queue.
#SBATCH --job-name=soda
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

# 120 s before the time limit, Slurm sends SIGUSR1 to this shell. The shell passes it to torchrun, and torchrun to its
# processes, which save and end.
stopped=
stop() {
  stopped=yes
  kill -USR1 "$job"
}
trap stop USR1

export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # since Slurm 22.05, srun does not take it from sbatch
head_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${PROCESSES_PER_NODE:-gpu}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$head_node:29400" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train.py "$@" &
job=$!

wait "$job"
status=$?
while kill -0 "$job" 2>/dev/null; do # a signal has ended `wait`, but not the job
  wait "$job"
  status=$?
done
if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
