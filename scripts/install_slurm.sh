#!/usr/bin/env bash
# What `make test-slurm` needs: Slurm's and munge's programs, from Debian's packages. Does nothing when they are there.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in slurmctld slurmd sbatch scontrol munged; do
  command -v "$program" >/dev/null || missing+=("$program")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "error: programs of Slurm are missing: ${missing[*]}" >&2
  echo "hint: install slurm-wlm and munge, as root on Debian: apt-get install slurm-wlm munge" >&2
  exit 1
fi
echo "installing slurm-wlm and munge" >&2
# RUNLEVEL=1: the packages' own daemons do not start, the tests start theirs.
apt-get update -qq
DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
