"""A child that misbehaves as its job says. Python 3, standard library.

    LOG, SEEN in its environment: a file that tells each begin, a directory of ids that were here.

A job is [kind, word]; its good reply is the word. Kinds that cost the child do so once.
"""

import json
import os
import time


def write(descriptor, data):
    data = data.encode() if isinstance(data, str) else data
    while data:
        data = data[os.write(descriptor, data) :]


def first_time(job):
    try:
        os.mkdir(os.path.join(os.environ["SEEN"], job))
    except FileExistsError:
        return False
    return True


log = os.open(os.environ["LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
requests = os.fdopen(0, "rb")
for line in iter(requests.readline, b""):
    request = json.loads(line)
    job, payload = request["id"], request["payload"]
    kind, word, *rest = payload["args"]
    write(log, f"{job} {os.getpid()} {time.monotonic()}\n")
    reply = {"id": job, "status": "ok", "result": word}
    if kind == "slow":
        time.sleep(0.05)
    elif kind == "big":
        reply["result"] = [word, "x" * 1_000_000]
    elif kind == "stderr":
        write(2, b"x" * 300_000 + b"\nlast words\n")
    elif kind == "throttled" and not payload["throttles"]:
        reply = {"id": job, "status": "throttled", "retry_after_secs": 0.1}
    elif kind == "error":
        reply = {"id": job, "status": "error", "message": word}
    elif kind == "retires":
        reply["retire"] = True
    elif kind == "hangs" and first_time(job):
        time.sleep(600)
    elif kind == "exits" and first_time(job):
        os._exit(3)
    elif kind == "rubbish" and first_time(job):
        write(1, b"\xff\0{]\n" * 100)
    write(1, json.dumps(reply) + "\n")
    if kind == "twice":
        write(1, json.dumps(reply) + "\n")
