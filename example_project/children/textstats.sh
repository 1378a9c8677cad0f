#!/bin/sh
# Replaces textstats.pl on a machine without perl: a warm shell loop, and one awk process for each
# file. It takes only the two values that it needs from the request. A path with a quote or a
# backslash is refused. It knows English letters only.

while IFS= read -r request; do
    id=${request#*'"id":"'}
    id=${id%%'"'*}
    path=${request#*'"args":["'}
    path=${path%%'"'*}
    case $path in
    '' | *'\'* | *'{'*) result= ;;
    *) result=$(LC_ALL=C awk -v pid=$$ '
        {
            characters += length($0) + 1
            line = tolower($0)
            while (match(line, /[a-z0-9_]+/)) {
                word = substr(line, RSTART, RLENGTH)
                words++
                if (!(word in seen)) { seen[word]; distinct++ }
                if (length(word) > length(longest)) longest = word
                line = substr(line, RSTART + RLENGTH)
            }
            line = $0
            sentences += gsub(/[.!?]+([ \t]|$)/, "", line)
        }
        END {
            if (!sentences && words) sentences = 1
            printf "{\"pid\":%d,\"child\":\"sh and awk\",\"characters\":%d,\"words\":%d,", \
                pid, characters, words
            printf "\"distinct_words\":%d,\"sentences\":%d,\"words_per_sentence\":%.3f,", \
                distinct, sentences, sentences ? words / sentences : 0
            printf "\"longest_word\":\"%s\"}", longest
        }' <"$path") ;;
    esac
    if [ -n "$result" ]; then
        printf '{"id":"%s","status":"ok","result":%s}\n' "$id" "$result"
    else
        printf '{"id":"%s","status":"error","type":"TextError","message":"can not read %s"}\n' \
            "$id" "${path%%'\'*}"
    fi
done
