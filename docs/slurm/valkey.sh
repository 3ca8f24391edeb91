#!/bin/bash
#SBATCH --array=0-7
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@180
# The first task runs a server, which is the cache of all tasks:  sbatch valkey.sh python experiment.py
shared=$SLURM_SUBMIT_DIR/valkey-cache

start() {
    cachepipe valkey start --dir "$disk/cache" --bind 0.0.0.0 --port 0 \
        --password-file "$job/password" --url-file "$job/url"
}

stop() {
    cachepipe valkey stop --dir "$disk/cache"
}

use() {
    export CACHEPIPE_DIR=$1
}

source "$SLURM_SUBMIT_DIR/array.sh"
