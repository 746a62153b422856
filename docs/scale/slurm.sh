#!/bin/bash
# One command of moemerge on all nodes of a Slurm job, by a Ray cluster that ends with the job. The job's exit code is
# the command's. Submit it from a folder that all nodes see, with moemerge[ray] in its .venv (or in $VENV):
#
#     sbatch --nodes=4 slurm.sh moemerge search recipe.yaml --data code=code.txt -o best.yaml --ray auto
#
#SBATCH --job-name=moemerge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --no-kill
#SBATCH --output=%x-%j.log
set -euo pipefail

# shellcheck source=/dev/null
source "${VENV:-.venv}/bin/activate"

# The address by which other nodes reach this one, the first. HEAD sets another, such as that of a faster network.
export HEAD=${HEAD:-$(getent ahostsv4 "$(hostname)" | awk '$1 !~ /^127\./ {print $1; exit}')} PORT=${PORT:-6379}
[ -n "$HEAD" ] || { echo "slurm.sh: $(hostname) has no address but 127.*; set HEAD to one." >&2; exit 1; }

# Without a token, whoever reaches the port runs programs as you.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

start_node() {
  set -- --num-cpus="$SLURM_CPUS_ON_NODE" --block
  if [ "$SLURM_PROCID" = 0 ]; then
    exec ray start --head --node-ip-address="$HEAD" --port="$PORT" --include-dashboard=false "$@"
  fi
  until ray start --address="$HEAD:$PORT" "$@"; do sleep 2; done
}

wait_for_nodes() {
  until python -c "
import ray
ray.init('$HEAD:$PORT', log_to_driver=False)
raise SystemExit(sum(node['Alive'] for node in ray.nodes()) < $SLURM_JOB_NUM_NODES)
" >/dev/null 2>&1; do sleep 2; done
}

export -f start_node wait_for_nodes
log=$SLURM_JOB_NAME-$SLURM_JOB_ID-ray.log
srun --no-kill --kill-on-bad-exit=1 --cpu-bind=none --quiet --output="$log" bash -c start_node &
nodes=$!
timeout "${START_SECONDS:-300}" bash -c wait_for_nodes &
if ! wait -n || ! kill -0 "$nodes" 2>/dev/null; then
  echo "slurm.sh: there is no Ray cluster of $SLURM_JOB_NUM_NODES nodes; what \`ray start\` said is in $log." >&2
  exit 1
fi

RAY_ADDRESS=$HEAD:$PORT "$@"
