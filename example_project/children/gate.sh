#!/bin/sh
# A token bucket that limits the rate of jobs. Usage: gate.sh BURST TOKENS_PER_SECOND
# The bucket lives in this process, so its group must have only one child. When the bucket is empty,
# the reply is "throttled" and says when the bucket will be full. Celery then sends the job again.
burst=${1:-10}
rate=${2:-20}

now() { # hundredths of a second, from a monotonic clock if there is one
    if [ -r /proc/uptime ]; then
        read -r hundredths _ </proc/uptime
        hundredths=${hundredths%.*}${hundredths#*.}
    else
        hundredths=$(date +%s)00
    fi
}

# Counted in hundredths of a token: a shell has only whole numbers.
full=$((burst * 100))
tokens=$full
now
before=$hundredths

while IFS= read -r request; do
    id=${request#*'"id":"'}
    id=${id%%'"'*}
    throttles=${request#*'"throttles":'}
    throttles=${throttles%%[!0-9]*}

    now
    tokens=$((tokens + (hundredths - before) * rate))
    before=$hundredths
    if [ $tokens -gt $full ]; then tokens=$full; fi

    if [ $tokens -ge 100 ]; then
        tokens=$((tokens - 100))
        printf '{"id":"%s","status":"ok","result":{"pid":%d,"throttles":%d}}\n' \
            "$id" $$ "${throttles:-0}"
    else
        wait=$(((full - tokens + rate - 1) / rate))
        printf '{"id":"%s","status":"throttled","retry_after_secs":%d.%02d}\n' \
            "$id" $((wait / 100)) $((wait % 100))
    fi
done
