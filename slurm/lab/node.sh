#!/usr/bin/env bash
# One node of the lab that LAB names: starts it, or kills it as a power cut would, with all it runs.
#   LAB=DIR slurm/lab/node.sh start|kill NODE
set -euo pipefail
verb=${1:?start or kill} node=${2:?the name of a node}
conf=${LAB:?the folder of a lab}/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin

# The daemon, its step daemons, and the processes of jobs, which know where they run.
processes() {
    local environment pid
    for environment in /proc/[0-9]*/environ; do
        pid=${environment//[^0-9]/}
        if tr '\0' '\n' 2>/dev/null <"$environment" | grep -qxF "SLURMD_NODENAME=$node" &&
            tr '\0' '\n' 2>/dev/null <"$environment" | grep -qxF "SLURM_CONF=$conf"; then
            echo "$pid"
        fi
    done
}

case $verb in
start) exec env SLURMD_NODENAME="$node" SLURM_CONF="$conf" slurmd -N "$node" -f "$conf" ;;
kill)
    # Twice: a process may have started another meanwhile.
    for _ in 1 2; do
        mapfile -t pids < <(processes)
        ((${#pids[@]} == 0)) || kill -KILL "${pids[@]}" 2>/dev/null || true
    done
    ;;
*) echo "$verb: start or kill" >&2 && exit 2 ;;
esac
