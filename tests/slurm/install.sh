#!/bin/sh
# The SLURM of Debian and Ubuntu for tests/slurm: `make slurm`. Nothing is configured and no service is started.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
if command -v slurmctld && command -v slurmd && command -v munged && command -v sbatch; then
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "error: user: got $(id -un), expected root: packages are installed. Call: sudo make slurm" >&2
    exit 2
fi
if ! command -v apt-get >/dev/null; then
    echo "error: apt-get: got nothing, expected Debian or Ubuntu. Install slurmctld, slurmd, srun and munged yourself" >&2
    exit 2
fi
# While this file says 101, packages do not start their services.
policy=/usr/sbin/policy-rc.d
[ ! -e "$policy" ] || mv "$policy" "$policy.before"
restore() {
    rm -f "$policy"
    [ ! -e "$policy.before" ] || mv "$policy.before" "$policy"
}
trap restore EXIT
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"
apt-get -q update
DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends slurmd slurmctld slurm-client munge
