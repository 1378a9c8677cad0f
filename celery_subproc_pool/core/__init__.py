"""What decides: which child does which job, and what becomes of both. Pure.

It may import `wire`, `settings`, `errors` and msgspec. It knows no clock, no process, no thread and
no Celery. Events come in as method calls with the time at which they happened; actions come out,
for `engine` to perform.

Read `states` first: the rules, and the tables that keep them. `model` holds all state and says
which module writes what. `scheduler` is the entry point: it takes the events, and shows which
module decides about them.

- Jobs: `jobs`, `queues`, `deadlines`, `time_limits`, `ending`, `crashes`.
- Children, in the order of a life: `spawning`, `booting`, `slots`, `service`, `replies`,
  `recycling`, `replacing`, `stopping`, `exits`.
- All of them: `sizing`, `shutdown`, `timers`.
- What comes out: `actions`, `outcomes`, and for operators `counters` and `stats`.
"""
