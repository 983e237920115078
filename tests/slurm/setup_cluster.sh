#!/usr/bin/env bash
# A Slurm cluster of one host for the tests: `setup_cluster.sh start FOLDER`, then `export SLURM_CONF=FOLDER/slurm.conf`,
# and at the end `setup_cluster.sh stop FOLDER`. Two nodes, n1 and n2, of two CPUs each, are two daemons on this host.
# Needs root and Debian's slurm-wlm and munge (apt-get install slurm-wlm munge); keeps all its files in FOLDER.
set -euo pipefail

command=$1
folder=$2
first_port=$((21000 + $$ % 1000 * 4)) # of four ports, so that clusters side by side do not meet

write_config() {
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$first_port
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for the expiry of its old credential, two minutes unless told otherwise.
AuthInfo=socket=$folder/munge.socket,cred_expire=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
KillWait=20
MpiDefault=none
ReturnToService=2
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((first_port + 1)) CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((first_port + 2)) CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=30 State=UP
CONF
}

start() {
    mkdir -p "$folder/state" "$folder/spool-n1" "$folder/spool-n2"
    chmod 755 "$folder"
    write_config
    head -c 128 /dev/urandom >"$folder/munge.key"
    chmod 600 "$folder/munge.key"
    munged --force --num-threads=1 --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -f "$SLURM_CONF"
    for node in n1 n2; do
        slurmd -N "$node" -f "$SLURM_CONF"
    done
    for _ in $(seq 100); do
        [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ] && return
        sleep 0.2
    done
    echo "the nodes did not come up within 20 seconds:" >&2
    tail -n 5 "$folder"/*.log >&2
    exit 1
}

stop() {
    for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
        [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")"
    done
    true
}

case $command in
    start | stop) "$command" ;;
    *) echo "start or stop, got $command" >&2 && exit 2 ;;
esac
