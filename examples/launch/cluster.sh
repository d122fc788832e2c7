#!/usr/bin/env bash
# A cluster on one machine: each host is a network namespace, h1, h2, … at 10.77.0.1, .2, …, on one bridge.
# TRACER_CLUSTER=a makes another one beside it: a1, a2, …; TRACER_NET is then its network, such as 10.78.0.
#
#   sudo examples/launch/cluster.sh up 2          # installs what is missing (apt), starts 2 hosts with sshd
#   sudo examples/launch/cluster.sh run h1 CMD …  # runs a command on a host
#   sudo examples/launch/cluster.sh slurm 2       # starts Slurm on them: sbatch and srun then work from this machine
#   sudo examples/launch/cluster.sh cut h2        # takes a host off the network; "mend h2" puts it back
#   sudo examples/launch/cluster.sh down          # removes all of it
#
# The hosts share this machine's files and processors. Needs root; changes nothing outside its own folder, the
# bridge, the namespaces, /etc/netns/h* and, for Slurm, munge's key.
set -euo pipefail
h=${TRACER_CLUSTER:-h}
state=/run/tracer-cluster-$h
net=${TRACER_NET:-10.77.0}
bridge=br-$h

install() {  # commands, then the packages that bring them
  local missing=()
  command -v ip >/dev/null || missing+=(iproute2)
  command -v sshd >/dev/null || [ -x /usr/sbin/sshd ] || missing+=(openssh-server openssh-client)
  command -v pdsh >/dev/null || missing+=(pdsh)
  if [ "${1:-}" = slurm ]; then
    [ -x /usr/sbin/slurmctld ] || missing+=(slurm-wlm)
    [ -x /usr/sbin/munged ] || missing+=(munge)
  fi
  [ ${#missing[@]} = 0 ] && return
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

hosts() { ls "$state/hosts" 2>/dev/null || true; }

run() {  # on a host: its network, its name, its /etc/hosts
  local host=$1
  shift
  exec ip netns exec "$host" unshare -u sh -c 'hostname "$0" && exec "$@"' "$host" "$@"
}

up() {
  local n=${1:-2} i
  [ -d "$state" ] && { echo "a cluster is up already: $0 down" >&2; exit 1; }
  install
  mkdir -p "$state/hosts" "$state/pids" /run/sshd
  ssh-keygen -q -t ed25519 -N '' -f "$state/key"
  ssh-keygen -q -t ed25519 -N '' -f "$state/host_key"
  cp "$state/key.pub" "$state/authorized_keys"
  chmod 700 "$state"
  chmod 600 "$state/authorized_keys"
  printf 'Host %s* %s.*\n IdentityFile %s\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n' \
    "$h" "$net" "$state/key" >"$state/ssh_config"
  ip link add "$bridge" type bridge
  ip addr add "$net.254/24" dev "$bridge"
  ip link set "$bridge" up
  { echo '127.0.0.1 localhost'; for i in $(seq "$n"); do echo "$net.$i $h$i"; done; } >"$state/etc_hosts"
  for i in $(seq "$n"); do
    touch "$state/hosts/$h$i"
    mkdir -p "/etc/netns/$h$i"
    cp "$state/etc_hosts" "/etc/netns/$h$i/hosts"
    ip netns add "$h$i"
    ip link add "veth-$h$i" type veth peer name eth0 netns "$h$i"
    ip link set "veth-$h$i" master "$bridge" up
    ip -n "$h$i" addr add "$net.$i/24" dev eth0
    ip -n "$h$i" link set eth0 up
    ip -n "$h$i" link set lo up
    (run "$h$i" /usr/sbin/sshd -f /dev/null -h "$state/host_key" -o "AuthorizedKeysFile=$state/authorized_keys" \
      -o PidFile="$state/pids/sshd-$h$i" -o UsePAM=no -o StrictModes=no -o PasswordAuthentication=no)
  done
}

slurm() {
  local n=${1:-2} cores i
  install slurm
  cores=$(nproc)
  mkdir -p "$state/slurm/ctld" /run/munge
  local sum port
  read -r sum _ < <(printf %s "$h" | cksum)
  port=$((20000 + sum % 10000))  # of this cluster alone
  [ -s /etc/munge/munge.key ] || dd if=/dev/urandom bs=128 count=1 of=/etc/munge/munge.key status=none
  chown munge /etc/munge /etc/munge/munge.key /run/munge
  chmod 400 /etc/munge/munge.key
  pgrep -x munged >/dev/null || { su -s /bin/sh munge -c '/usr/sbin/munged --force' && touch "$state/pids/munged.ours"; }
  cat >"$state/slurm/slurm.conf" <<CONF
ClusterName=tracer
SlurmctldHost=$(hostname)($net.254)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
StateSaveLocation=$state/slurm/ctld
SlurmdSpoolDir=$state/slurm/%n
SlurmctldPidFile=$state/pids/slurmctld
SlurmdPidFile=$state/pids/slurmd-%n
SlurmctldLogFile=$state/slurm/slurmctld.log
SlurmdLogFile=$state/slurm/%n.log
$(for i in $(seq "$n"); do echo "NodeName=$h$i NodeAddr=$net.$i CPUs=$cores State=UNKNOWN"; done)
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
CONF
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$state/slurm/cgroup.conf"
  export SLURM_CONF=$state/slurm/slurm.conf
  slurmctld
  for i in $(seq "$n"); do
    mkdir -p "$state/slurm/$h$i"
    (run "$h$i" /usr/sbin/slurmd -N "$h$i")
  done
  for _ in $(seq 60); do
    [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = "$n" ] && { echo "export SLURM_CONF=$SLURM_CONF"; return; }
    sleep 0.5
  done
  echo "Slurm does not come up: see $state/slurm/*.log" >&2
  exit 1
}

cut() { ip link set "veth-$1" down; }
mend() { ip link set "veth-$1" up; }

down() {
  local host file
  for file in "$state"/pids/*; do
    if [ "$file" = "$state/pids/munged.ours" ]; then
      kill "$(cat /run/munge/munged.pid)" 2>/dev/null || true
    elif [ -s "$file" ]; then
      kill "$(cat "$file")" 2>/dev/null || true
    fi
  done
  for host in $(hosts); do
    ip netns pids "$host" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
    ip link del "veth-$host" 2>/dev/null || true
    ip netns del "$host" 2>/dev/null || true
    rm -rf "/etc/netns/$host"
  done
  ip link del "$bridge" 2>/dev/null || true
  rm -rf "$state"
}

case ${1:-} in
  up | down | run | slurm | cut | mend) "$@" ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
