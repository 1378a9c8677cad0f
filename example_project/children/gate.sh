#!/bin/sh
# A gate that lets only so many jobs through: a token bucket. Usage: gate.sh BURST TOKENS_PER_SECOND
# The bucket lives in this process, so its group must have one child. When it is empty the reply is
# "throttled", and says when the bucket will be full again; Celery then sends the job once more.
burst=${1:-10}
rate=${2:-20}

now() { # hundredths of a second, from a clock that never goes back, where there is one
    if [ -r /proc/uptime ]; then
        read -r hundredths _ </proc/uptime
        hundredths=${hundredths%.*}${hundredths#*.}
    else
        hundredths=$(date +%s)00
    fi
}

# Counted in hundredths of a token, since a shell knows whole numbers only.
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
