#!/bin/bash
#SBATCH --array=0-7
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@180
# The first task runs a proxy, and all tasks use it:  sbatch serve.sh python experiment.py
# It needs OPENAI_API_KEY, and UPSTREAM unless that is OpenAI.
shared=$SLURM_SUBMIT_DIR/proxy-cache

start() {
    head -c 32 /dev/urandom | base64 | tr -d '+/=\n' >"$job/token"
    TOKEN=$(cat "$job/token") cachepipe serve --upstream "${UPSTREAM:-https://api.openai.com/v1}" \
        --api-key-env OPENAI_API_KEY --token-env TOKEN --cache "$disk/cache" \
        --host 0.0.0.0 --port 0 --url-file "$job/url" &
    server=$!
    until [ -s "$job/url" ]; do
        kill -0 "$server"
        sleep 1
    done
}

stop() {
    kill "$server" 2>/dev/null || true
    wait "$server" || true
}

use() { # each task is a replicate, so the tasks draw independent samples, and a rerun gets the same ones
    OPENAI_BASE_URL=${1%/v1}/ns/experiment/rep/$SLURM_ARRAY_TASK_ID/v1
    OPENAI_API_KEY=$(cat "$job/token")
    export OPENAI_BASE_URL OPENAI_API_KEY
}

source "$SLURM_SUBMIT_DIR/array.sh"
