#!/bin/bash
@OPTIONS@
#SBATCH --requeue
set -uo pipefail
cd @FOLDER@
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
@SETUP@
# Only this job's own processes may speak to its Ray.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
status_file=@STATUS_FILE@
rm -f "$status_file"

# Where a node's Ray listens: its own address, unless the target gives it another.
address_of() {
  case "$1" in
@ADDRESSES@
    *) srun --overlap --exact --nodes=1 --ntasks=1 --nodelist="$1" hostname --ip-address | awk '{print $1}' ;;
  esac
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_address=$(address_of "${nodes[0]}")
port=$((20000 + SLURM_JOB_ID % 9000))
echo "hvqd: start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on ${nodes[*]} ($head_address)"

start_node() {  # NODE ADDRESS OPTIONS…
  local node=$1 address=$2; shift 2
  srun --exact --nodes=1 --ntasks=1 --nodelist="$node" \
    @START_RAY@ --node-ip-address="$address" @RESOURCES@ --disable-usage-stats --block "$@" >/dev/null 2>&1 &
}
start_node "${nodes[0]}" "$head_address" --head --port="$port" \
  --include-dashboard=true --dashboard-port=0
for node in "${nodes[@]:1}"; do
  start_node "$node" "$(address_of "$node")" --address="$head_address:$port"
done

driver=
again=no
on_notice() { again=yes; [ -n "$driver" ] && kill -TERM "$driver" 2>/dev/null; }
trap on_notice USR1

export RAY_ADDRESS="$head_address:$port"
@WAIT_FOR_NODES@ --address "$RAY_ADDRESS" --head "$head_address" || { echo 1 > "$status_file"; exit 1; }
bash -c @JOB@ &
driver=$!
wait "$driver"; status=$?
while kill -0 "$driver" 2>/dev/null; do wait "$driver"; status=$?; done  # a trap ends a wait early
if [ "$again" = yes ] && [ "$status" -ne 0 ]; then
  echo "hvqd: told to make room; queued again, it goes on from its root"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60
fi
echo "$status" > "$status_file"
exit "$status"
