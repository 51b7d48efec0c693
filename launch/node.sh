#!/usr/bin/env bash
# One host of a run under a scheduler: `OUTPUT_DIR=runs/x bash launch/node.sh torchrun ... launch/train.py --config FILE`.
# A SIGTERM or SIGUSR1 makes all ranks of all hosts save and end. The exit code tells schedulers what torchrun's does not:
# 0 the run has finished, 75 it was preempted and the same command goes on with it, any other: it has failed.
set -u
: "${OUTPUT_DIR:?is not set}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270} # seconds to save; torch before 2.13 always takes 30

status() { cat "$OUTPUT_DIR/run_status.json" 2>/dev/null; }

before=$(status)
(
    trap '' USR1 # torchrun would die of it and leave its ranks; some schedulers send it to every process
    exec "$@" --output_dir "$OUTPUT_DIR"
) &
torchrun=$!
asked=
trap 'trap : TERM USR1; asked=1; kill -TERM $torchrun' TERM USR1 # once: a second signal would end the ranks before they have saved
wait $torchrun
code=$?
while kill -0 $torchrun 2>/dev/null; do # a signal ends `wait`
    wait $torchrun
    code=$?
done
[ $code -ne 0 ] || code=1

after=$(status)
new=$([ "$after" = "$before" ] || echo "$after") # where this start was refused, the status is an earlier one's
case $new in
*'"state": "finished"'*) code=0 ;;
*'"state": "preempted"'*) code=75 ;;
*'"state": "failed"'*) ;;
*) [ -z "$asked" ] || code=75 ;; # ended before it began, or not in time: it goes on from its last checkpoint
esac
echo "$(hostname): $OUTPUT_DIR: $(echo "$after" | tr -d '\n'); exit code $code" >&2
exit $code
