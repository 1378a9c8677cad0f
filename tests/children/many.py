"""A child on asyncio that has many jobs at a time, and can do all that a child may announce.

    python -I -S many.py READY

READY is what it says first, as JSON, to which `status` and `protocol` are added. A job is a list:
what to do, and with what.
"""

import asyncio
import json
import os
import sys

JOBS = {}


def say(**fields):
    data = json.dumps(fields).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


async def cancelled(job):
    """Wait until the worker says that the job is to end; return why."""
    return await job["cancel"]


async def wait_and_answer(job, how, begun=os.devnull):
    """End when told to."""
    open(begun, "w").close()
    why = await cancelled(job)
    print("told to end:", why, file=sys.stderr, flush=True)
    say(id=job["id"], status=how, result=why, message=why)


async def tell(job, count, pause):
    for number in range(1, count + 1):
        say(id=job["id"], status="progress", meta={"done": number, "of": count})
        await asyncio.sleep(pause)
    say(id=job["id"], status="ok", result=count)


async def follow(job, count, directory):
    """Tell of each step, and go on to the next when somebody says so."""
    for number in range(1, count + 1):
        say(id=job["id"], status="progress", meta={"done": number, "of": count})
        while not os.path.exists(os.path.join(directory, str(number))):
            await asyncio.sleep(0.01)
    say(id=job["id"], status="ok", result=count)


async def answer_when(job, path):
    while not os.path.exists(path):
        await asyncio.sleep(0.01)
    say(id=job["id"], status="ok", result="waited")


async def log(job, level, message, about):
    say(**({"id": job["id"]} if about else {}), status="log", level=level, message=message)
    say(id=job["id"], status="ok")


async def sleep(job, seconds):
    await asyncio.sleep(seconds)
    say(id=job["id"], status="ok", result=os.getpid())


async def append(job, path):
    with open(path, "a") as file:
        file.write("run\n")
    say(id=job["id"], status="ok")


async def hang(job):
    await asyncio.sleep(600)


async def leave(job, status):
    os._exit(status)


async def ok(job, result):
    say(id=job["id"], status="ok", result=result)


async def answer_as(job, ids):
    """Write a final reply for each of some ids; None is the job's own."""
    for task_id in ids:
        say(id=task_id or job["id"], status="ok", result="done")


async def say_all(job, messages):
    """Write some lines; their id "" is the job's own."""
    for message in messages:
        say(**{**message, **({"id": job["id"]} if message.get("id") == "" else {})})


async def main():
    loop = asyncio.get_running_loop()
    requests = asyncio.StreamReader(limit=2**26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    say(status="ready", protocol=1, **json.loads(sys.argv[1]))
    while line := await requests.readline():
        request = json.loads(line)
        task_id = request["id"]
        if "cancel" in request:
            job = JOBS.get(task_id)
            if job is not None and not job["cancel"].done():
                job["cancel"].set_result(request["cancel"])
            continue
        what, *args = request["payload"]["args"]
        job = JOBS[task_id] = {"id": task_id, "cancel": loop.create_future()}
        job["task"] = asyncio.ensure_future(globals()[what](job, *args))


asyncio.run(main())
