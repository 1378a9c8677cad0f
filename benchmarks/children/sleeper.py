"""A child on asyncio that answers each request after as many seconds as its argument says.

It can have many jobs at a time, as many as its group's `max_in_flight` lets it have.
"""

import asyncio
import json
import sys


def say(**message):
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def main():
    loop = asyncio.get_running_loop()
    requests = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    say(status="ready", protocol=1, features=["multiplex"])
    while line := await requests.readline():
        request = json.loads(line)
        [seconds] = request["payload"]["args"]
        loop.call_later(seconds, lambda task_id=request["id"]: say(id=task_id, status="ok"))


asyncio.run(main())
