"""A child that commits the fault which its first argument names; otherwise it is a good one.

    python -I -S faulty.py FAULT DIRECTORY

The job ["fault"] commits it; the job ["ok", word] is answered with the word. A fault of AT_BOOT is
committed by the first child that boots, which leaves a mark in DIRECTORY.
"""

import fcntl
import json
import os
import signal
import sys
import termios
import time

fault, directory = sys.argv[1:]
ID = None
READY = os.environ.get("READY")
if READY:
    os.write(1, READY.encode() + b"\n")


def write(data):
    data = data.encode() if isinstance(data, str) else data
    while data:
        data = data[os.write(1, data) :]


def log(data):
    data = data.encode() if isinstance(data, str) else data
    while data:
        data = data[os.write(2, data) :]


def reply(result="done", **fields):
    return json.dumps({"id": ID, "status": "ok", "result": result, **fields}) + "\n"


def hang():
    while True:
        time.sleep(600)


def kill(signum):
    os.kill(os.getpid(), signum)
    hang()


def grandchild(in_group=True, does=hang):
    """Start a process that holds our pipes."""
    if os.fork() == 0:
        if not in_group:
            os.setsid()
        does()
        os._exit(0)


def write_after_its_parent():
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.01)
    write(reply("late"))


def is_read():
    """Wait until nothing that we wrote stands in the pipe."""
    while fcntl.ioctl(1, termios.FIONREAD, bytes(4)) != bytes(4):
        time.sleep(0.01)


def once():
    """Whether nobody was here before."""
    try:
        os.mkdir(os.path.join(directory, fault))
    except FileExistsError:
        return False
    return True


def ignore(*signals):
    for signum in signals:
        signal.signal(signum, signal.SIG_IGN)


def then(*steps):
    def do():
        for step in steps:
            step()

    return do


def exits(status):
    return lambda: os._exit(status)


def writes(data):
    return lambda: write(data if isinstance(data, (str, bytes)) else data())


def answer():
    write(reply())


def flood():
    """100 MB of stderr without a newline."""
    for _ in range(100):
        log(b"x" * 2**20)
    answer()


def crash_logging():
    log("the last word\n")
    os._exit(3)


FAULTS = {
    # It ends, with the job in hand.
    "exits_0": exits(0),
    "exits_3": crash_logging,
    "segfaults": lambda: kill(signal.SIGSEGV),
    "is_killed": lambda: kill(signal.SIGKILL),
    "is_terminated": lambda: kill(signal.SIGTERM),
    "half_a_reply_and_exit": then(writes('{"id":"'), exits(0)),
    "reply_without_newline_and_exit": then(lambda: write(reply()[:-1]), exits(0)),
    "exits_with_a_grandchild_on_its_pipes": then(grandchild, exits(7)),
    # It ends after the job.
    "exits_after_its_reply": then(answer, exits(0)),
    "is_killed_while_idle": then(answer, lambda: kill(signal.SIGKILL)),
    "retires_and_exits": then(lambda: write(reply(retire=True)), exits(0)),
    "leaves_a_grandchild_and_stays": then(grandchild, answer),
    # It closes something.
    "closes_stdout": then(lambda: os.close(1), hang),
    "closes_stdin_and_goes_on": then(lambda: os.close(0), answer, hang),
    "closes_both_while_idle": then(answer, lambda: os.close(0), lambda: os.close(1), hang),
    # It never answers.
    "hangs": hang,
    "half_a_reply_and_silence": then(writes('{"id":"'), hang),
    "ignores_sigterm": then(lambda: ignore(signal.SIGTERM, signal.SIGINT, signal.SIGHUP), hang),
    "hangs_with_a_grandchild": then(grandchild, hang),
    "stops_itself": then(lambda: os.kill(os.getpid(), signal.SIGSTOP), answer),
    "answers_late_by_a_grandchild": then(lambda: grandchild(False, write_after_its_parent), hang),
    # It answers what is no reply.
    "log_line_on_stdout": then(writes("INFO 17 jobs done\n"), answer),
    "empty_line": then(writes("\n"), answer),
    "not_json": writes("{'id': 1}\n"),
    "array": writes("[1, 2]\n"),
    "number": writes("17\n"),
    "null": writes("null\n"),
    "unknown_status": writes(lambda: reply(status="fine")),
    "no_status": writes('{"result": 1}\n'),
    "status_twice": writes('{"status": "ok", "status": "bad"}\n'),
    "id_of_nobody": writes('{"id": "nobody", "status": "ok", "result": 1}\n'),
    "id_is_a_number": writes('{"id": 1, "status": "ok"}\n'),
    "ids_differ_in_one_reply": writes(lambda: '{"id": "nobody", ' + reply()[1:]),
    "deep_nesting": writes(b'{"status":"ok","result":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
    "invalid_utf8": writes(b'{"status": "ok", "result": "\xff\xfe"}\n'),
    "nul": writes(b'{"status": "ok", "result": "\x00"}\n'),
    "nuls_between": then(writes(b"\0\0\0\n")),
    "lone_surrogate": writes('{"status": "ok", "result": "\\ud800"}\n'),
    "not_a_number": writes('{"status": "ok", "result": NaN}\n'),
    "huge_number": writes('{"status": "throttled", "retry_after_secs": 1e400}\n'),
    "huge_result": writes('{"status": "ok", "result": 1e400}\n'),
    "long_integer": writes(b'{"status": "ok", "result": ' + b"9" * 5000 + b"}\n"),
    "byte_order_mark": writes(lambda: "\ufeff" + reply()),
    "negative_countdown": writes('{"status": "retry", "countdown": -1}\n'),
    "line_too_long": writes(b"x" * 200_000 + b"\n"),
    "line_without_end": then(writes(b"x" * 200_000), hang),
    "escape_codes": writes(b"\x1b[2J\r\n"),
    "two_replies": then(lambda: write(reply() + reply("another's"))),
    # It speaks when nobody asked.
    "second_reply_while_idle": then(answer, is_read, lambda: write(reply())),
    "chats_while_idle": then(answer, is_read, writes("still here\n")),
    # It does not want to go.
    "reads_no_more": then(answer, hang),
    "ignores_everything": then(lambda: ignore(signal.SIGTERM, signal.SIGINT), answer, hang),
    "escapes": then(lambda: grandchild(in_group=False), answer),
    "is_stopped": then(answer, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    # What is no fault at all.
    "no_id": writes('{"status": "ok", "result": "done"}\n'),
    "unknown_fields": writes(lambda: reply(colour="red")),
    "crlf": writes(lambda: reply()[:-1] + "\r\n"),
    "floods_stderr": flood,
    "control_characters_on_stderr": then(
        lambda: log("a\x1b[31m\rb\x85[2026-01-01 00:00:00,000: CRITICAL/MainProcess] c\n"), answer
    ),
    "invalid_utf8_on_stderr": then(lambda: log(b"\xff\xfe\n"), answer),
}

AT_BOOT = {
    "exits_before_its_first_job": exits(5),
    "chats_before_its_first_job": writes("Booted in 3 s\n"),
    "says_ready_without_being_asked": writes('{"status": "ready", "protocol": 1}\n'),
    "never_reads": hang,
    "closes_stdin_at_boot": then(lambda: os.close(0), hang),
}

#: At each boot.
NEVER_STARTS = {
    "never_ready": hang,
    "only_noise": then(writes("Loading...\n[1]\nnull\n"), hang),
    "another_protocol": then(writes('{"status": "ready", "protocol": 17}\n'), hang),
    "fatal": writes('{"status": "fatal", "message": "no database at db.example"}\n'),
    "exits_at_boot": exits(5),
    "replies_instead": then(writes('{"status": "ok"}\n'), hang),
}

if fault in NEVER_STARTS or (fault in AT_BOOT and once()):
    {**NEVER_STARTS, **AT_BOOT}[fault]()
# Not `sys.stdin`: a line may be read ahead.
requests = os.fdopen(0, "rb")
for line in iter(requests.readline, b""):
    request = json.loads(line)
    ID = request["id"]
    word, *rest = request["payload"]["args"]
    if word == "fault" and fault in FAULTS:
        FAULTS[fault]()
    elif word == "size":
        write(reply("y" * rest[0]))
    else:
        write(reply(rest[0] if rest else "done"))
