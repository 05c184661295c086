#!/usr/bin/env bash
# Builds the CPU image and runs in it, as the image's user, the demo, then a server, a worker and a flow run.
#
#     deployments/try_images.sh [FOLDER WITH A WHEEL OF TORCH]
#
# Needs root on Debian, and no Docker: apt-get install buildah debootstrap. The folder replaces PyTorch's index if that
# cannot be reached. BASE=debian builds the base from Debian's packages, under the name of the official image.
set -euo pipefail
cd "$(dirname "$0")/.."
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
IMAGE=glmbatch:cpu
PYTHON_IMAGE=$(sed -n 's/^FROM //p' deployments/Dockerfile)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
# If this machine reaches registries through a proxy, these include the proxy's certificate.
CERTIFICATES=/etc/ssl/certs/ca-certificates.crt

if [ "${BASE:-}" = debian ] && ! buildah inspect --type image "$PYTHON_IMAGE" > "$WORK/base.json" 2>&1; then
  debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$WORK/base" > "$WORK/log"
  # As in the official image, `python` exists and `pip` installs for all users.
  ln -s python3 "$WORK/base/usr/bin/python"
  rm -rf "$WORK"/base/usr/lib/python3*/EXTERNALLY-MANAGED "$WORK"/base/var/cache/apt/archives/*.deb
  printf 'FROM scratch\nCOPY base /\n' > "$WORK/Dockerfile"
  buildah bud --quiet -t "$PYTHON_IMAGE" "$WORK"
fi

began=$SECONDS
ARGUMENTS=(--build-arg DEVICE=cpu --volume "$CERTIFICATES:$CERTIFICATES:ro")
if [ -n "${1:-}" ]; then
  ARGUMENTS+=(--volume "$(realpath "$1"):/torch:ro" --build-arg TORCH_FROM=/torch)
fi
buildah bud --pull=never --quiet "${ARGUMENTS[@]}" -f deployments/Dockerfile -t "$IMAGE" .
echo "built in $((SECONDS - began)) s: $(buildah images --format '{{.Size}}' "$IMAGE")"

container=$(buildah from --pull=never "$IMAGE")
trap 'rm -rf "$WORK"; buildah rm "$container" > /dev/null' EXIT
in_image() { buildah run --user glmbatch "$container" -- "$@"; }

# The code belongs to root, and there is no compiler.
in_image sh -c 'test "$(id -u)" = 1000 && test ! -w glmbatch && ! command -v gcc'
began=$SECONDS
code=0
in_image python -m glmbatch.cli.main run sample_data/reviews.yaml || code=$?
test "$code" -eq 3  # the sample has bad rows on purpose
echo "the demo took $((SECONDS - began)) s"

began=$SECONDS
# One process group, like a container: the server, the worker and the client that starts a run.
in_image bash -c '
  set -euo pipefail
  trap "kill \$(jobs -p)" EXIT
  export PREFECT_SERVER_API_AUTH_STRING=trial:trial PREFECT_API_AUTH_STRING=trial:trial
  export PREFECT_SERVER_CSRF_PROTECTION_ENABLED=true PREFECT_SERVER_API_PORT=${PORT:-4299}
  export PREFECT_API_URL=http://127.0.0.1:$PREFECT_SERVER_API_PORT/api
  prefect server start > /tmp/server.log 2>&1 &
  for _ in $(seq 120); do
    python -c "import os, urllib.request as u; u.urlopen(os.environ[\"PREFECT_API_URL\"] + \"/health\")" 2> /dev/null && break
    sleep 1
  done
  python -m deployments.local deploy
  prefect worker start --pool glmbatch --type process --install-policy never > /tmp/worker.log 2>&1 &
  prefect deployment run annotate/nightly --watch > /tmp/watch.log || { tail -n 40 /tmp/*.log; exit 1; }
  tail -n 1 /tmp/watch.log
  python -m glmbatch.cli.main verify sample_data/out-nightly
'
echo "server, worker and flow run took $((SECONDS - began)) s"
