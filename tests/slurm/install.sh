#!/usr/bin/env bash
# Install the Debian packages that the test cluster needs, without starting their services.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
missing=()
for program_package in munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client ip:iproute2; do
  command -v "${program_package%:*}" >/dev/null || missing+=("${program_package#*:}")
done
((${#missing[@]})) || exit 0
[[ $(id -u) == 0 ]] || { echo "error: ${missing[*]}: not installed, and only root can install them: apt-get install ${missing[*]}" >&2; exit 2; }
command -v apt-get >/dev/null || { echo "error: ${missing[*]}: not installed, and this machine has no apt-get" >&2; exit 2; }

no_services=/usr/sbin/policy-rc.d
if [[ ! -e $no_services ]]; then
  printf '#!/bin/sh\nexit 101\n' >$no_services
  chmod 755 $no_services
  trap 'rm -f $no_services' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --yes --no-install-recommends "${missing[@]}" >/dev/null
