// A child that has many jobs at a time, on Node. It announces its tasks.
const fs = require("node:fs");
const readline = require("node:readline");

const say = (message) => process.stdout.write(JSON.stringify(message) + "\n");
const sleep = (seconds) => new Promise((wake) => setTimeout(wake, seconds * 1000));
const cancels = new Map();

const tasks = {
  async "node.sleep"(id, seconds) {
    await sleep(seconds);
    return process.pid;
  },
  // Tells of each step, and goes on to the next when somebody says so.
  async "node.follow"(id, count, directory) {
    for (let number = 1; number <= count; number++) {
      say({ id, status: "progress", meta: { done: number, of: count } });
      while (!fs.existsSync(`${directory}/${number}`)) await sleep(0.01);
    }
    return count;
  },
  async "node.until_cancelled"(id) {
    throw new Error(await new Promise((end) => cancels.set(id, end)));
  },
};

async function run({ id, payload }) {
  try {
    say({ id, status: "ok", result: await tasks[payload.task](id, ...payload.args) });
  } catch (e) {
    say({ id, status: "error", message: e.message, type: e.name, traceback: e.stack });
  }
  cancels.delete(id);
}

say({
  status: "ready", protocol: 1, name: `node ${process.version}`, tasks: Object.keys(tasks),
  features: ["progress", "cancel", "multiplex"],
});
readline.createInterface({ input: process.stdin, crlfDelay: Infinity }).on("line", (line) => {
  const message = JSON.parse(line);
  if ("cancel" in message) cancels.get(message.id)?.(message.cancel);
  else run(message);
});
