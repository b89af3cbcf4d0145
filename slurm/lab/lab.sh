#!/usr/bin/env bash
# A real, throw-away Slurm cluster on this machine: several slurmd, one slurmctld, one munged, all of
# their state in one folder. It lives as long as COMMAND runs (default: a shell) and no longer.
#
#   slurm/lab/lab.sh [--nodes N] [--port P] [--folder DIR] [COMMAND...]
#
# COMMAND finds the cluster by SLURM_CONF; LAB names the folder (slurm/lab/node.sh needs it). P and
# the N ports after it must be free; clusters with other ports do not meet.
# Debian packages: slurm-wlm slurm-wlm-basic-plugins munge.
# Traps call functions:
# shellcheck disable=SC2317,SC2329
set -euo pipefail

nodes=3 port=17010 folder=""
while (($#)) && [[ $1 == --* ]]; do
    case $1 in
    --nodes) nodes=$2 ;;
    --port) port=$2 ;;
    --folder) folder=$2 ;;
    *) echo "unknown option $1" >&2 && exit 2 ;;
    esac
    shift 2
done
if ! [[ $nodes =~ ^[1-9][0-9]?$ && $port =~ ^[1-9][0-9]{3,4}$ ]]; then
    echo "--nodes $nodes --port $port: 1 to 99 nodes, and a port of 4 or 5 digits" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
export PATH=$PATH:/usr/sbin:/sbin
for program in munged slurmctld slurmd sbatch; do
    if ! command -v "$program" >/dev/null; then
        echo "no $program: apt-get install slurm-wlm slurm-wlm-basic-plugins munge" >&2
        exit 2
    fi
done

# The path of a socket may have 107 characters, so the default is short and a long one is refused.
own_folder=""
if [[ -z $folder ]]; then
    folder=$(mktemp -d /tmp/slurm-lab.XXXXXX)
    own_folder=$folder
fi
mkdir -p "$folder"/{munge,state,spool,log,pid,gpu}
LAB=$(cd "$folder" && pwd)
if ((${#LAB} > 80)) || ! [[ $LAB =~ ^[A-Za-z0-9_./-]+$ ]]; then
    echo "--folder $LAB: at most 80 of the characters A-Z a-z 0-9 _ . / -" >&2
    exit 2
fi
export LAB SLURM_CONF=$LAB/slurm.conf

# Ends what a pid file names, if that is still one of this lab's daemons.
end() { # PID_FILE
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$LAB" || return 0
    kill "$pid" 2>/dev/null || return 0
    for _ in {1..50}; do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

down() {
    trap '' INT TERM HUP
    scancel --state=running --signal=KILL --full --quiet --user="$(id -un)" 2>/dev/null || true
    for node in $(seq "$nodes"); do
        "$here/node.sh" kill "node$node" || true
    done
    end "$LAB/pid/slurmctld"
    end "$LAB/pid/munged"
    [[ -z $own_folder ]] || rm -rf "$own_folder"
}
trap down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

umask 022
(umask 077 && head -c 1024 /dev/urandom >"$LAB/munge/key")
munged --force --num-threads 2 --key-file "$LAB/munge/key" --socket "$LAB/munge/sock" \
    --pid-file "$LAB/pid/munged" --log-file "$LAB/log/munged" --seed-file "$LAB/munge/seed"

sed -e "s|@LAB@|$LAB|g" -e "s|@HOST@|$(hostname -s)|g" -e "s|@USER@|$(id -un)|g" \
    -e "s|@NODES@|$nodes|g" -e "s|@PORT@|$port|g" -e "s|@FIRST@|$((port + 1))|g" \
    -e "s|@LAST@|$((port + nodes))|g" "$here/slurm.conf" >"$SLURM_CONF"
# Files for GPUs: Slurm counts and numbers them, and nothing opens them.
touch "$LAB"/gpu/{0..7}
echo "NodeName=node[1-$nodes] Name=gpu File=$LAB/gpu/[0-7]" >"$LAB/gres.conf"

slurmctld -c -f "$SLURM_CONF"
for node in $(seq "$nodes"); do
    "$here/node.sh" start "node$node"
done

ready=0
while ((ready < nodes && SECONDS < 60)); do
    sleep 0.1
    ready=$(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | wc -l) || true
done
if ((ready < nodes)); then
    echo "only $ready of $nodes nodes came up:" >&2
    sinfo --Node --long >&2 || true
    tail -n 5 "$LAB"/log/* >&2
    exit 1
fi
echo "Slurm with $nodes nodes; SLURM_CONF=$SLURM_CONF" >&2

status=0
if (($# == 0)); then
    "${SHELL:-bash}" || status=$?
else
    # In the background, so that a signal ends the lab at once and not when COMMAND is done.
    "$@" <&0 &
    wait $! || status=$?
fi
exit "$status"
