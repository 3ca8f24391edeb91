# shellcheck shell=bash disable=SC2154,SC2329
# The part that serve.sh and valkey.sh share; they define $shared, start, stop and use.
#
# The first task of the array owns the cache. It copies the cache from the shared disk to a local one, starts the
# server there, and saves the cache when all tasks have ended, or before its time limit. The others wait for its URL.
set -euo pipefail
umask 077
job=$shared/job-$SLURM_ARRAY_JOB_ID # what the tasks of this array tell each other
mkdir -p "$job"
first=$((SLURM_ARRAY_TASK_ID == SLURM_ARRAY_TASK_MIN))
program='' owner='' disk='' restored=''

own() {
    local new
    owner=$shared/owner # a link that names the array which owns the cache
    ln -sT "$SLURM_ARRAY_JOB_ID" "$owner" 2>/dev/null || [ "$(readlink "$owner")" = "$SLURM_ARRAY_JOB_ID" ] || {
        echo "array $(readlink "$owner") owns $shared. If it does not run any more: rm $owner" >&2
        owner=''
        exit 1
    }
    rm -f "$job"/{url,ended}
    disk=$(mktemp -d)
    mkdir "$disk/cache"
    if [ -d "$shared/cache" ]; then
        if [ ! -L "$shared/cache" ]; then # a cache from elsewhere; save replaces links only
            new=$(mktemp -d "$shared/cache-XXXXXX")
            mv -T "$shared/cache" "$new"
            ln -sT "$(basename "$new")" "$shared/cache"
        fi
        cp -R "$shared/cache/." "$disk/cache"
    fi
    restored=1
    start
}

save() { # the link changes at once, so the saved cache is whole whenever this is killed
    local new old
    old=$(readlink "$shared/cache" || true)
    new=$(mktemp -d "$shared/cache-XXXXXX") &&
        cp -R "$disk/cache/." "$new" &&
        ln -sT "$(basename "$new")" "$new.link" &&
        mv -T "$new.link" "$shared/cache" &&
        { [ -z "$old" ] || rm -rf "${shared:?}/$old"; }
}

all_done() {
    local ended
    ended=("$job"/done-*)
    [ "${#ended[@]}" -ge "$SLURM_ARRAY_TASK_COUNT" ]
}

finish() {
    local code=$?
    trap '' TERM INT
    [ -z "$program" ] || kill "$program" 2>/dev/null || true
    touch "$job/done-$SLURM_ARRAY_TASK_ID"
    if ((first)); then
        touch "$job/ended"
        [ -z "$restored" ] || { stop && save && rm -rf "$disk"; } || {
            echo "the cache is not saved; it is on $(hostname) in $disk" >&2
            code=1
        }
        rm -f "$job"/{url,token,password}
        ! all_done || rm -rf "$job"
        [ -z "$owner" ] || rm -f "$owner"
    fi
    exit "$code"
}
trap finish EXIT
trap 'exit 143' TERM INT

if ((first)); then own; fi
until [ -s "$job/url" ]; do
    [ ! -e "$job/ended" ] || { echo "the first task of the array has ended" >&2 && exit 1; }
    sleep 1
done
use "$(cat "$job/url")"

code=0
srun "$@" & # in the background, because bash hears no signal during a command in the foreground
program=$!
wait "$program" || code=$?
program=''
touch "$job/done-$SLURM_ARRAY_TASK_ID"
if ((first)); then
    until all_done; do sleep 1; done
fi
exit "$code"
