"""A healthy child that does what its first argument says: a list of steps, in order.

["reply", {...}]    a final reply; the id is added unless given, dropped if it is None
["write", "text"]   that, and a newline, to stdout
["raw", "text"]     that, without a newline
["stderr", "text"]  that, and a newline, to stderr
["exit", 3]         exit
["signal", 9]       signal oneself
["wait", path]      wait until the file is there
["touch", path]     make the file
["facts"]           reply with pid, job count, working directory, environment, descriptors
["payload"]         reply with the payload
["note", path]      add the payload as a line of JSON to the file
["size", n]         reply with a string of n characters
["append", path, w] add the line w (default "run") to the file
["die_once", path]  make the file and die, unless it is there
["requeue", path]   reject with requeue and make the file; reply ok if it is there
["own", "pid", {..}] reply with the process' id, in a list, and {..} in the reply
["eat", n]          take n MiB, and keep them
["start", n]        start a process that takes n MiB, and wait until it has them
["escape"]          start a process in a session of its own; reply with its id
["throttle", n, s]  reply throttled with s seconds until it was n times, then ok; with
["retry"]           behind it, then retry
Anything that is no list of steps is echoed.
"""

import json
import os
import signal
import subprocess
import sys
import time

jobs = 0
eaten = []


def write(text):
    os.write(1, text.encode())


def reply(request, fields):
    full = {"id": request["id"], "status": "ok", **fields}
    if full["id"] is None:
        del full["id"]
    data = (json.dumps(full) + "\n").encode()
    while data:
        data = data[os.write(1, data) :]


def facts():
    return {
        "pid": os.getpid(),
        "jobs": jobs,
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
        "session": os.getsid(0),
    }


def wait(path):
    while not os.path.exists(path):
        time.sleep(0.005)


def throttle(request, times, seconds):
    payload = request["payload"]
    counts = {name: payload[name] for name in ("throttles", "retries")}
    if counts["throttles"] < times:
        reply(request, {"status": "throttled", "retry_after_secs": seconds})
    elif ["retry"] in payload["args"][0]:
        reply(request, {"status": "retry", "countdown": 0, "message": "try again"})
    else:
        reply(request, {"result": counts})


def requeue(request, path):
    if os.path.exists(path):
        reply(request, {"result": "delivered again"})
    else:
        open(path, "w").close()
        reply(request, {"status": "reject", "requeue": True})


def die_once(request, path):
    if not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)


def append(request, path, word="run"):
    with open(path, "a") as file:
        file.write(word + "\n")


def note(request, path):
    append(request, path, json.dumps(request["payload"]))


def own(request, name, more):
    reply(request, {"result": [os.getpid()], **more})


SLEEPER = "import sys, time; x = bytearray(%d << 20); print(flush=True); time.sleep(600)"


def start(request, megabytes):
    argv = [sys.executable, "-S", "-c", SLEEPER % megabytes]
    subprocess.Popen(argv, stdout=subprocess.PIPE).stdout.read(1)


def escape(request):
    argv = [sys.executable, "-S", "-c", SLEEPER % 1]
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(
        argv, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True
    )
    reply(request, {"result": process.pid})


def eat(request, megabytes):
    eaten.append(b"x" * (megabytes << 20))


STEPS = {
    "own": own,
    "eat": eat,
    "start": start,
    "escape": escape,
    "die_once": die_once,
    "append": append,
    "note": note,
    "requeue": requeue,
    "throttle": throttle,
    "retry": lambda request: None,
    "reply": reply,
    "write": lambda request, text: write(text + "\n"),
    "raw": lambda request, text: write(text),
    "stderr": lambda request, text: os.write(2, text.encode() + b"\n"),
    "exit": lambda request, status: os._exit(status),
    "signal": lambda request, number: os.kill(os.getpid(), number),
    "wait": lambda request, path: wait(path),
    "touch": lambda request, path: open(path, "w").close(),
    "facts": lambda request: reply(request, {"result": facts()}),
    "payload": lambda request: reply(request, {"result": request["payload"]}),
    "size": lambda request, length: reply(request, {"result": "x" * length}),
}


def are_steps(value):
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(step, list) and step and step[0] in list(STEPS) for step in value)
    )


signal.signal(signal.SIGINT, signal.SIG_IGN)
for line in sys.stdin:
    request = json.loads(line)
    jobs += 1
    args = request["payload"]["args"]
    steps = args[0] if args and are_steps(args[0]) else [["reply", {"result": args}]]
    for step in steps:
        STEPS[step[0]](request, *step[1:])
